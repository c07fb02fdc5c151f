import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError


def saved(inner, folder):
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def word_level(words, **added):
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece()
    return inner


LETTERS = ["[UNK]", "[MASK]", "[", "##M", "##A", "##S", "##K", "##]", "hi", "M", "A", "##ASK", "ASK", "MASK"]


def test_nothing_and_the_wrong_thing_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"wanted the word `byte`, .* found nothing; check the path or run `megadiff train_tok"
    ):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "nowhere.txt").write_text("x")
    with pytest.raises(DataError, match=r"found nothing; check the path"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "nowhere.json").write_text("x")
    with pytest.raises(DataError, match=r"found nothing; did you mean .*/nowhere\.json\?"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"found a folder without them"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"found another file"):
        load_tokenizer(tmp_path / "notes.md")
    with pytest.raises(DataError, match=r"no\.json: the tokenizer cannot be read \(No such file or directory\)"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(DataError, match=r"no\.model: the tokenizer cannot be read \(No such file or directory\)"):
        load_tokenizer(tmp_path / "no.model")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"null"])
def test_a_damaged_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: (not a whole tokenizer\.json|wanted a tokenizer with)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100])
def test_a_damaged_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model: (not a whole SentencePiece model|wanted a SentencePiece)"):
        load_tokenizer(tmp_path)


def test_two_models_in_a_folder_are_refused(tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"wanted one \.model file, found 2 \(a\.model, b\.model\)"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_mask_gets_the_first_id_past_every_live_one(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 7}, unk_token="a"))
    inner.add_special_tokens(["<s>", "</s>"])
    tokenizer = load_tokenizer(saved(inner, tmp_path / "t"))
    live = max(inner.get_vocab().values())
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (live + 1, live + 2)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (inner.token_to_id("<s>"), inner.token_to_id("</s>"))
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "a b c"


@pytest.mark.parametrize("name", ["<|mask|>", "[MASK]", "<mask>", "<|mdm_mask|>"])
def test_a_mask_is_known_by_its_name(tmp_path, name):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.add_special_tokens([name])
    assert load_tokenizer(saved(inner, tmp_path / "t")).mask_id == inner.token_to_id(name)


def test_what_tokenizer_config_says_comes_first(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.add_special_tokens(["<s>", "<hole>", "<start>"])
    folder = saved(inner, tmp_path / "t")
    said = {"mask_token": {"content": "<hole>"}, "bos_token": "<start>", "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_id == inner.token_to_id("<hole>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (inner.token_to_id("<start>"), None)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(folder)


def test_a_token_that_is_eos_too_is_no_mask(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.add_special_tokens(["<|endoftext|>"])
    folder = saved(inner, tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<|endoftext|>"}))
    assert load_tokenizer(folder).mask_id == 2


def test_a_vocabulary_that_spells_its_mask_in_text_is_cut_around_it(tmp_path):
    """WordPiece over whitespace takes the whole word `[MASK]` from its vocabulary, special or not."""
    inner = word_level(LETTERS)
    inner.add_special_tokens([AddedToken("[MASK]", special=True)])
    tokenizer = load_tokenizer(saved(inner, tmp_path / "t"))
    assert tokenizer.mask_id == 1
    for ids in (tokenizer.encode("hi [MASK] hi"), tokenizer.encode_batch(["hi [MASK] hi"])[0]):
        assert 1 not in ids
        assert len(ids) > 3


def test_truncation_padding_and_templates_of_the_file_are_not_applied(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain = load_tokenizer(saved(inner, tmp_path / "plain"))
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    limited = load_tokenizer(saved(inner, tmp_path / "limited"))
    assert limited.encode("a a a") == limited.encode_batch(["a a a"])[0] == [0, 0, 0]
    assert limited.fingerprint == plain.fingerprint


def test_another_vocabulary_has_another_fingerprint(tmp_path):
    found = {
        load_tokenizer(saved(tokenizers.Tokenizer(models.WordLevel(v, unk_token="a")), tmp_path / f"t{i}")).fingerprint
        for i, v in enumerate(({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"a": 0, "b": 1, "c": 2}))
    }
    assert len(found) == 3


def sentencepiece_model(path, **options):
    model = io.BytesIO()
    lines = [f"hello world number {n} of many" for n in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=35, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def test_a_foreign_sentencepiece_model_keeps_its_ids_and_gains_a_mask(tmp_path):
    tokenizer = sentencepiece_model(tmp_path / "llama.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (35, 36)
    assert tokenizer.decode([35, *tokenizer.encode("hello world"), 2]) == "hello world"


def test_a_user_defined_mask_piece_never_comes_out_of_text(tmp_path):
    """SentencePiece matches user-defined symbols in any text."""
    tokenizer = sentencepiece_model(tmp_path / "t.model", user_defined_symbols=["<mask>"], byte_fallback=False)
    assert tokenizer.vocab_size == 35
    assert tokenizer.mask_id not in tokenizer.encode("hello <mask> world <mask>")


@pytest.mark.parametrize("kind", ["char", "word"])
def test_a_model_without_json_is_read_by_its_library_and_ships_alone(tmp_path, kind):
    tokenizer = sentencepiece_model(tmp_path / "t.model", model_type=kind, hard_vocab_limit=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    text = "hello world <s> number 7"
    assert tokenizer.export_limits is not None
    assert [*tokenizer.encode_pieces(text)] == [tokenizer.encode(text)] == tokenizer.encode_batch([text])
    assert tokenizer.encode("hello world") == library.encode("hello world")
    (tmp_path / "out").mkdir()
    assert tokenizer.export(tmp_path / "out", seq_length=8) == ["tokenizer.model"]
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_draws_its_ids_always_gives_the_same_ones(tmp_path):
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    tokenizer = load_tokenizer(saved(inner, tmp_path / "t"))
    assert {tuple(tokenizer.encode("abab")) for _ in range(20)} == {(2, 2)}


def test_a_vocabulary_with_a_shared_id_and_no_mask_is_refused(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "c": 1}, unk_token="a"))
    path = saved(inner, tmp_path / "t") / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 0', '"a": 0, "b": 0'))
    with pytest.raises(DataError, match=r"two tokens have one id, so no mask can be added behind them"):
        load_tokenizer(tmp_path / "t")


def test_special_names_of_one_character_are_a_fault_of_the_text(tmp_path):
    """A name of one character cannot be cut."""
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "_": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = saved(inner, tmp_path / "t")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "_"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a a") == [0, 0]
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(DataError, match=r"the tokenizer turns its text into the special token '_' \(id 1\)"):
            call("a _")


def test_a_model_with_a_piece_that_is_no_text_is_refused(tmp_path):
    sentencepiece_model(tmp_path / "t.model")
    damaged = (tmp_path / "t.model").read_bytes().replace(b"<unk>", b"<\xff\xff\xff>")
    (tmp_path / "t.model").write_bytes(damaged)
    with pytest.raises(DataError, match=r"t\.model: not a whole SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")
