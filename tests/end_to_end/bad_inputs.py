"""The tables of bad inputs: each sequence is what is wrong, and a pattern of the sentence it gets: cause, then
remedy."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from tests.support.runs import write_corpus

EVALUATE = "tools/evaluate.py elbo --model {run} --data {data}"
GENERATE = "tools/generate.py --model {run}"
PREPROCESS = "tools/preprocess_data.py --tokenizer byte --output-prefix {tmp}/o"
TRAIN_TOKENIZER = "tools/train_tokenizer.py --output {tmp}/t --vocab-size 300"
"""Commands; an option given again counts."""

DESCRIPTIONS = [
    # keys and types
    (
        "optimizer.weigth_decay=0.1",
        1,
        r"unknown key `optimizer\.weigth_decay`; did you mean `optimizer\.weight_decay`\?",
    ),
    ("layers=4", 1, r"command line: unknown key `layers`; did you mean `model\.layers`"),
    ("model.layers=many", 1, r"command line: `model\.layers` wants an integer, found `many`$"),
    ("model=4", 1, r"`model` wants a mapping of keys, found `4`"),
    ("schedule.steps=1.5", 1, r"`schedule\.steps` wants an integer or null, found `1\.5`"),
    ("optimizer.lr=", 1, r"`optimizer\.lr` wants a number, found nothing \(null\)"),
    ("optimizer.lr=inf", 1, r"`optimizer\.lr` must be a finite number, found `inf`"),
    # ranges
    ("optimizer.lr=-1", 1, r"`optimizer\.lr` must be greater than 0, found `-1`"),
    ("optimizer.beta1=1", 1, r"`optimizer\.beta1` must be less than 1, found `1`"),
    ("checkpoint.every=0", 1, r"`checkpoint\.every` must be greater than 0, found `0`"),
    ("seed=-1", 1, r"`seed` must be greater than or equal to 0, found `-1`"),
    ("noise.scale=1.5", 1, r"command line: `noise\.scale`: .*at most 1, got 1\.5: .*does not exist"),
    ("noise.shift=sideways", 1, r"noise\.shift.*masked.*balanced.*uniform.*sideways"),
    ("optimizer.name=adamm", 1, r"unknown name `adamm`; did you mean `adamw`\?"),
    ("name=../evil", 1, r"`name`: name must be a plain folder name .* got '\.\./evil'"),
    # what does not divide
    ("model.heads=5", 1, r"model\.hidden is 32, which model\.heads = 5 does not divide"),
    ("model.heads=32", 1, r"model\.hidden / model\.heads is 1, but rotary embeddings need an even width"),
    (
        "parallel.tensor=3",
        3,
        r"model\.heads is 4, which parallel\.tensor = 3 does not divide; parallel\.tensor of 1, 2 or 4 would do",
    ),
    (
        "parallel.tensor=3 model.heads=12 model.hidden=48 model.vocab_multiple=1",
        3,
        r"the padded vocabulary is 260, which .* = 3 does not divide; parallel\.tensor of 1, 2 or 4 would do",
    ),
    (
        "parallel.pipeline=3",
        3,
        r"model\.layers is 4, which parallel\.pipeline = 3 does not divide; .*\.pipeline of 1, 2 or 4 would do",
    ),
    (
        "batch.global_batch_size=7",
        1,
        r"batch\.global_batch_size is 7, which .* = 2 does not divide; batch.global_batch_size of 6 or 8 would do",
    ),
    (
        "parallel.tensor=2",
        3,
        r"the run has 3 rank\(s\), but parallel\.tensor=2 .* needs a multiple of 2; .* ranks that fit: 2",
    ),
    # settings that do not go together
    ("parallel.sequence=true", 1, r"parallel\.sequence is true but parallel\.tensor is 1"),
    ("parallel.virtual_pipeline=2", 1, r"parallel\.virtual_pipeline is 2 but parallel\.pipeline is 1"),
    ("parallel.overlap_param_gather=true", 1, r"overlap_param_gather needs parallel\.distributed_optimizer and"),
    ("precision.master_weights=false", 1, r"master_weights=false needs precision\.compute=bf16 \(found fp32\)"),
    ("schedule.tokens=1e6", 1, r"schedule needs exactly one of `steps`, `tokens` and `flops`; found steps and tokens"),
    (
        "schedule.warmup_steps=20",
        1,
        r"warm-up \(20 steps\) and cooldown .* do not fit .* shorten one of them or train l",
    ),
    (
        "batch.rampup={start: 16, increment: 2, every_steps: 5}",
        1,
        r"rampup\.start is 16, above .* = 8.*; lower it, or leave",
    ),
    # overrides of another form
    ("noise.shift", 1, r"command line: `noise\.shift` is not of the form key\.sub=value"),
    ("a..b=1", 1, r"command line: `a\.\.b=1` is not of the form key\.sub=value"),
    ("noise.shift=[1", 1, r"the value of `noise\.shift`: not valid YAML: .*expected ',' or '\]'"),
    ("data.train.7.path=x", 1, r"`data\.train` is a list of 1, so `data\.train\.7` must name an item from 0 to 1"),
    ("--steps=4", 1, r"`--steps=4` is no option of this command; .* key\.sub=value: `schedule\.steps=4`"),
    ("--model.layers 4", 1, r"`--model\.layers 4` is no option of this command; .*: `model\.layers=4`$"),
    ("--tensor-model-parallel-size 2", 1, r"`--tensor-model-parallel-size 2` is no option .*: `parallel\.tensor=2`$"),
    ("--chekc", 1, r"`--chekc` is no option of this command; did you mean `--check`\?"),
    ("--bf16", 1, r"`--bf16` is no option of this command; .*: `precision\.compute=bf16`$"),
    ("--num-gpus 8", 1, r"`--num-gpus 8` is no option of this command: the number of ranks is given to the launcher"),
    ("model.layers 4", 1, r"`model\.layers 4` is not of the form key\.sub=value; write `model\.layers=4`$"),
    ("model.layers = 4", 1, r"`model\.layers = 4` is not of the form .*; leave out the blanks: `model\.layers=4`$"),
    ("model.layers: 4", 1, r"`model\.layers:` is not of the form key\.sub=value; write `model\.layers=4`$"),
    # names of other trainers
    ("model.learning_rate=1e-3", 1, r"unknown key `model\.learning_rate`; did you mean `optimizer\.lr`\?"),
    ("tensor_model_parallel_size=2", 1, r"`tensor_model_parallel_size`; did you mean `parallel\.tensor`\?"),
    ("training.seq_len=512", 1, r"unknown key `training`; `training\.seq_len` is `model\.seq_length` here"),
    ("parallel.context=2", 1, r"unknown key `parallel\.context`: context parallelism is not available"),
    (
        "batch_size=8",
        1,
        r"`batch_size`: the batch of a step is batch\.global_batch_size, and what a rank takes at once",
    ),
    # data, tokenizer, machine, folder
    ("data.train=[nowhere/text]", 1, r"data\.train\[0\]: .*nowhere/text: no indexed data; wanted nowhere/text\.idx"),
    (
        "data.tokenizer=nowhere",
        1,
        r"nowhere: wanted the word `byte`, .* found nothing; check the path or run `megadiff tra",
    ),
    (
        "data.vocab_size=300",
        1,
        r"data\.vocab_size is 300, but the tokenizer byte has 260 ids .*; set it to that or leave",
    ),
    (
        "model.seq_length=9000",
        1,
        r"wanted at least one sequence of 9000 tokens, found \d+ in all; give more text or lower",
    ),
    ("platform=cuda", 1, r"`platform=cuda`, but torch sees no CUDA device here; give `platform=cpu`"),
    ("output_dir=/proc/nowhere", 1, r"the run folder /proc/nowhere/toy cannot be written \(.*\); set output_dir to a"),
    ("output_dir=/dev/null", 1, r"the run folder /dev/null/toy cannot be written \(Not a directory\); set output_dir"),
    (
        "checkpoint.start_from=nowhere",
        1,
        r"nowhere: there is no such folder; give a step_\* folder",
    ),
]
"""Overrides, number of ranks, sentence."""


def bomb(levels: int = 6) -> bytes:
    lines = [b"a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, levels):
        lines.append(b"a%d: &a%d [%s]" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)))
    return b"\n".join(lines)


FILES = [
    ("broken", b"a: [1, 2\nb: }", r"bad\.yaml:2: not valid YAML: .*expected ',' or '\]', but got ':'"),
    ("tabs", b"model:\n\tlayers: 4\n", r"bad\.yaml:2: not valid YAML: .*; indent with spaces"),
    ("key twice", b"name: a\nname: b\n", r"bad\.yaml:2: the key `name` is given twice, first on line 1"),
    ("empty", b"", r"bad\.yaml: the file is empty; a mapping of keys is wanted"),
    ("only a comment", b"# nothing\n", r"bad\.yaml: the file is empty; a mapping of keys is wanted"),
    ("a list", b"- a\n- b\n", r"bad\.yaml:1: the top level must be a mapping of keys, found a list"),
    (
        "latin 1",
        "name: caf\xe9\n".encode("latin-1"),
        r"bad\.yaml: .* not UTF-8 text \(byte 9\); give the path of a YAML file in UTF-8",
    ),
    (
        "utf 16",
        "name: a\n".encode("utf-16"),
        r"bad\.yaml: .* not UTF-8 text \(byte 0\); give the path of a YAML file in UTF-8",
    ),
    ("a nul", b"name: a\x00b\n", r"bad\.yaml:1: not valid YAML: the control character '\\x00'"),
    (
        "two documents",
        b"name: a\n---\nname: b\n",
        r"bad\.yaml:2: not valid YAML: expected a single document in the stream, but found another document",
    ),
    (
        "a tag",
        b"a: !!python/object/apply:os.system ['true']",
        r"bad\.yaml:1: the tag .*os\.system` is not allowed; write",
    ),
    ("a bomb", bomb(), r"bad\.yaml:\d: more than 50000 values once aliases are written out"),
    ("2 MB", b"#" * 2_000_000, r"bad\.yaml: .*2,000,000 bytes where at most 1,000,000 are wanted"),
    ("a circle", b"base: bad.yaml\n", r"bad\.yaml:1: base files go in a circle: .*bad\.yaml -> .*bad\.yaml"),
    ("no base", b"base: nowhere.yaml\n", r"bad\.yaml:1: the base file .*nowhere\.yaml does not exist"),
    ("a folder", None, r"bad\.yaml: the run description is a folder, not a plain file; give the path of a YAML file"),
]
"""Content of the file (None for a folder) and the sentence; the first word of an entry is its name."""


def _patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset if offset >= 0 else path.stat().st_size + offset)
        file.write(data)


def _big_id(prefix: Path) -> None:
    for end in (".bin", ".idx", ".json"):
        os.remove(f"{prefix}{end}")
    write_corpus(prefix, tokens=600, vocab_size=4000)
    os.remove(f"{prefix}.json")
    _patched(Path(f"{prefix}.bin"), 2 * 17, (3999).to_bytes(2, "little"))


AGAIN = r"copy or preprocess the data again"
DATA = [
    (
        "magic",
        lambda p: _patched(Path(f"{p}.idx"), 0, b"X"),
        r"copy\.idx: wanted the magic .*byte 0.*; give the prefix",
    ),
    ("version", lambda p: _patched(Path(f"{p}.idx"), 9, b"\2"), rf"copy\.idx: wanted version 1 .*found 2; {AGAIN}"),
    (
        "dtype",
        lambda p: _patched(Path(f"{p}.idx"), 17, b"\6"),
        rf"copy\.idx: wanted an integer dtype.*found 6; {AGAIN}",
    ),
    (
        "count",
        lambda p: _patched(Path(f"{p}.idx"), 18, struct.pack("<Q", 2**63)),
        rf"copy\.idx: wanted \d+ bytes.*{AGAIN}",
    ),
    ("length", lambda p: _patched(Path(f"{p}.idx"), 34, struct.pack("<i", -5)), rf"length\[0\].*found -5; {AGAIN}"),
    (
        "documents",
        lambda p: _patched(Path(f"{p}.idx"), -8, struct.pack("<q", 1)),
        rf"copy\.idx: wanted doc.*found.* 1; {AGAIN}",
    ),
    ("idx cut", lambda p: os.truncate(f"{p}.idx", 500), rf"copy\.idx: wanted \d+ bytes .*found 500; {AGAIN}"),
    ("idx empty", lambda p: os.truncate(f"{p}.idx", 0), rf"copy\.idx: wanted .*header.*found.*; {AGAIN}"),
    (
        "bin halved",
        lambda p: os.truncate(f"{p}.bin", 6000),
        rf"copy\.bin: wanted \d+ bytes, found 6000; .*cut short: {AGAIN}",
    ),
    ("no bin", lambda p: os.remove(f"{p}.bin"), r"found no .*copy\.bin; run `megadiff preprocess_data` first"),
    (
        "manifest",
        lambda p: Path(f"{p}.json").write_text("{"),
        r"copy\.json: .*not JSON.*; make the data again or remove",
    ),
    (
        "big id",
        _big_id,
        r"document \d+ has the token id 3999 at position \d+ .*; preprocess the corpus with the tokenizer",
    ),
]
"""What is done to the copy of a corpus at a prefix, sentence."""

CONTINUED = [
    (
        "schedule.steps=3",
        r"step_00000004 was saved after step 4, but this run ends after step 3; set schedule\.steps above",
    ),
    (
        "seed=4 model.layers=2",
        r"belongs to another run; (?=.*seed: 3 -> 4)(?=.*model\.layers: 4 -> 2).* another `name`",
    ),
    ("model.hidden=64", r"model\.hidden: 32 -> 64.*Give the run another `name`, or the settings it was started with"),
    (
        "name=b checkpoint.start_from={run}",
        r"toy is not a complete checkpoint: .*; give a step_\* folder written by a run",
    ),
    (
        "name=b schedule.steps=2 checkpoint.start_from={run}/checkpoints/step_00000004",
        r"was saved after step 4, but this run ends after step 2; set schedule\.steps above",
    ),
]
"""Overrides with which a run of 4 steps is to go on, sentence."""


def _rewritten(manifest: Path, **changes: object) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


CHECKPOINTS = [
    ("manifest cut", lambda step: os.truncate(step / "manifest.json", 200), r"damaged.*take another"),
    (
        "manifest of tomorrow",
        lambda step: _rewritten(step / "manifest.json", format=99),
        r"(format 99.*version|damaged.*take)",
    ),
    (
        "manifest missing",
        lambda step: (step / "manifest.json").unlink(),
        r"no complete checkpoint in it; give a run folder",
    ),
    ("shard missing", lambda step: next(step.glob("*.distcp")).unlink(), r"distcp.* is missing.*take another"),
    (
        "shard cut",
        lambda step: os.truncate(next(step.glob("*.distcp")), 1000),
        r"damaged: 1000 bytes instead of \d+.*take",
    ),
    (
        "shard changed",
        lambda step: _patched(next(step.glob("*.distcp")), 999, b"?!"),
        r"damaged: its content has changed.*take",
    ),
]
"""What is done to a checkpoint, sentence."""

TOOLS = [
    (EVALUATE + " --model nowhere", r"nowhere: no such folder; give a run folder \(such as runs/NAME\)"),
    (EVALUATE + " --data nowhere", r"nowhere: no indexed data; .*; run `megadiff preprocess_data` first"),
    (EVALUATE + " --tokenizer nowhere", r"nowhere: wanted the word `byte`.*check the path"),
    (EVALUATE + " --output no/x.json", r"--output no/x\.json: there is no folder no; make it"),
    (EVALUATE + " --output {tmp}", r"--output .* is a folder; give the name of a file in"),
    (EVALUATE + " --sequences 1", r"--sequences: must be at least 2 for a standard error, got 1"),
    (EVALUATE + " --platform cuda", r"`--platform cuda`, but torch sees no CUDA device here; give `--platform cpu`"),
    (
        GENERATE + " --model {tmp}",
        r"no complete checkpoint in it; give a run folder \(such as runs/NAME\) or one of its",
    ),
    (GENERATE + " --prompt xxxxxxxxxxxxxxxx", r"--prompt takes 16 tokens and .* sequences of 16.*; shorten"),
    (GENERATE + " --num-tokens 17", r"--num-tokens must be at most 16, got 17: .* sequences of 16 tokens$"),
    (
        GENERATE + " --num-tokens 9 --prompt xxxxxxxx",
        r"must be at most 8, got 9: .* 16 tokens, of which --prompt takes 8$",
    ),
    (GENERATE + " --steps 0", r"error: --steps must be at least 1, got 0$"),
    (GENERATE + " --count 0", r"error: --count must be at least 1, got 0$"),
    (GENERATE + " --temperature -1", r"error: --temperature must be at least 0 and finite, got -1\.0$"),
    (GENERATE + " --temperature nan", r"error: --temperature must be at least 0 and finite, got nan$"),
    (GENERATE + " --top-k 0", r"error: --top-k must be at least 1, got 0$"),
    (GENERATE + " --top-p 2", r"error: --top-p must lie in \(0, 1\], got 2\.0$"),
    ("tools/generate.py", r"the following arguments are required: --model"),
    (PREPROCESS + " --input nowhere.txt", r"nowhere\.txt: no such file; check the path"),
    (PREPROCESS + " --input {tmp}/*.csv", r"\*\.csv: no file matches; check the path after --input"),
    (PREPROCESS + " --input {tmp}/number.jsonl", r":2: `text` must be a string, found a"),
    (PREPROCESS + " --input {tmp}/key.jsonl", r":1: no key `text` .*--json-key"),
    (PREPROCESS + " --input {tmp}/a.jsonl.gz", r"not a whole \.gz file .*; fetch or make"),
    (PREPROCESS + " --input {tmp}/a.doc", r"wanted a name that ends in one of .*; rename"),
    (PREPROCESS + " --input {tmp}/a.txt --workers 0", r"--workers must be at least 1, found"),
    (PREPROCESS + " --tokenizer nowhere --input {tmp}/a.txt", r"nowhere: wanted the word `byte`.*check the"),
    (PREPROCESS + " --output-prefix {data} --input {tmp}/a.txt", r"data are there already; choose another --output"),
    (TRAIN_TOKENIZER + " --input nowhere.txt", r"nowhere\.txt: no such file; check the path"),
    (TRAIN_TOKENIZER + " --vocab-size 3 --input {tmp}/a.txt", r"--vocab-size must be at least 260 .*found 3; give"),
    (TRAIN_TOKENIZER + " --vocab-size 9999 --input {tmp}/a.txt", r"vocabulary of \d+ at most.*; give more text or"),
    (TRAIN_TOKENIZER + " --output {run} --input {tmp}/a.txt", r"wanted a new or empty folder.*; choose another"),
    (
        "tools/doctor.py noise.shift=masked",
        r"`noise\.shift=masked` changes a run description, but none is given; add --config FILE",
    ),
    ("tools/doctor.py --ranks 0", r"--ranks must be at least 1, got 0"),
]
"""Command, sentence."""

INSPECT = "tools/inspect_checkpoint.py"
EXPORT = "tools/convert_checkpoint.py export --checkpoint {run} --output {tmp}/hf"
LIKELIHOOD = "tools/evaluate.py likelihood --model {run} --data {tmp}/key.jsonl"
DOCTOR = "tools/doctor.py --config {yaml}"
CHECK = "pretrain_dlm.py --config {yaml} --check"
NATURAL = [
    # files and folders
    ("pretrain_dlm.py --config rnu.yaml", "rnu.yaml"),
    ("pretrain_dlm.py --config {tmp}/rum.yaml", "did you mean {tmp}/run.yaml?"),
    ("pretrain_dlm.py --config {tmp}/a.txt", "a.txt"),
    ("pretrain_dlm.py --config {tmp}", "{tmp}: the run description is a folder, not a plain file"),
    ("pretrain_dlm.py {yaml}", "did you mean `--config {tmp}/run.yaml`?"),
    ("pretrain_dlm.py --config {yaml} --ranks 4", "--ranks 4 lays a run out with --check; .*--nproc-per-node 4"),
    (CHECK + f" output_dir={{tmp}}/{'x' * 300}", "is too long for a path; give a shorter output_dir or name"),
    (EVALUATE + " --data {tmp}/vaild", "--data: {tmp}/vaild: no indexed data"),
    (EVALUATE + " --data {data}x", "--data: {data}x: no indexed data; .*did you mean {data}?"),
    (EVALUATE + " --data {tmp}/a.txt", "--data: {tmp}/a.txt: .*is a file; make indexed data of it"),
    (EVALUATE + " --data {data} --model {run}/checkpoint", "{run}/checkpoint: .*did you mean {run}/checkpoints?"),
    (EVALUATE + " --data {data} --tokenizer {tmp}/words.json", "another tokenizer .* --tokenizer"),
    (LIKELIHOOD + " --data {data}", "{data}: wanted a .jsonl file"),
    (LIKELIHOOD, "'prompt'.*'body'"),
    (LIKELIHOOD + " --text-key txet", "'txet'"),
    (LIKELIHOOD + " --draws 3", "--draws: must be even"),
    (GENERATE + " --model {tmp}/a.txt", "{tmp}/a.txt"),
    (GENERATE + " --model {run}x", "did you mean {run}?"),
    (GENERATE + " --trace no/x.html", "--trace no/x.html"),
    (EXPORT + " --checkpoint {tmp}/nothing", "{tmp}/nothing: no such folder"),
    (EXPORT + " --max-shard-size big", "--max-shard-size .*'big'"),
    (EXPORT + " --dtype fp16", "--dtype.*'fp16'"),
    (INSPECT + " {tmp}/nothing", "{tmp}/nothing: no such folder"),
    ("tools/report.py {tmp}", "{tmp} holds no metrics.jsonl"),
    ("tools/report.py {run} --output {tmp}/x.pdf", "--output {tmp}/x.pdf"),
    ("tools/check_data.py {data} --tokenizer {tmp}/nothing", "{tmp}/nothing"),
    (PREPROCESS + " --input {tmp}/a.txt --tokenizer bytes", "bytes: wanted the word `byte`"),
    (PREPROCESS + " --input {tmp}/a.jsonl", "{tmp}/a.jsonl: no such file"),
    (TRAIN_TOKENIZER + " --input {tmp}/a.txt --type wordpiece", "--type.*'wordpiece'"),
    (TRAIN_TOKENIZER + " --input {tmp}/a.txt --vocab-size 32k", "--vocab-size.*'32k'"),
    # options that do not exist, or lack their value
    (GENERATE + " --max-new-tokens 5", "--max-new-tokens 5"),
    (GENERATE + " --num-token", "--num-token"),
    (GENERATE + " --temprature 0.5", "--temprature 0.5; did you mean `--temperature`?"),
    (EVALUATE + " --data {data} --sequence 8 --noise-level 2 --batch-size 4", "--batch-size 4"),
    (EVALUATE + " --data {data} --sequences some", "--sequences: wants an integer, found 'some'"),
    (GENERATE + " --steps 1.5", "--steps: wants an integer, found '1.5'"),
    (GENERATE + " --temperature hot", "--temperature: wants a number, found 'hot'"),
    ("tools/evaluate.py perplexity --model {run} --data {data}", "'perplexity'"),
    ("tools/convert_checkpoint.py exprot --checkpoint {run}", "'exprot'"),
    # settings
    (CHECK + " model.hidden=33", "model.hidden is 33"),
    (CHECK + " noise.shift=uniforn", "uniforn"),
    (CHECK + " data.train=[{tmp}/nothing]", "data.train[0]: {tmp}/nothing"),
    (CHECK + " data.tokenizer={tmp}/words.json", "data.tokenizer to the first"),
    (CHECK + " --ranks 3 parallel.tensor=2", "parallel.tensor=2"),
    (CHECK + " --ranks two", "--ranks.*'two'"),
    (CHECK + " optimizer.lr=1e-3x", "optimizer.lr.*1e-3x"),
    (CHECK + " schedule.steps=1,000", "schedule.steps.*1,000"),
    (CHECK + " --per-device-train-batch-size 8", "--per-device-train-batch-size 8.*batch.micro_batch_size=8"),
    (CHECK + " hidden_size=64", "`hidden_size`; did you mean `model.hidden`?"),
    (CHECK + " n_layer=2", "`n_layer`; did you mean `model.layers`?"),
    (CHECK + " model.layers 4", "`model.layers=4`"),
    (CHECK + " platform=gpu", "found `gpu`; did you mean `cuda`?"),
    (CHECK + " precision.compute=float32", "found `float32`; did you mean `fp32`?"),
    (CHECK + " optimizer=adam", "found `adam`; did you mean `optimizer.name=adamw`?"),
    (CHECK + " hooks=[wanbd]", "found `wanbd`; did you mean `hooks.0.name=wandb`?"),
    (CHECK + " data.train={data}", "`data.train` wants a list, found `{data}`; a list of one item is written [{data}]"),
    (GENERATE + " --model {run}/checkpoints/step_2", "did you mean {run}/checkpoints/step_00000002? give a run folder"),
    ("tools/plan.py --flops 1e20 --noise maskd", "`maskd`; did you mean `masked`? there are"),
    ("tools/evaluate.py --model {run} --data {data}", "required: {{elbo,likelihood}}"),
    (DOCTOR + " --rank two", "--rank"),
    (DOCTOR + " --set lr=2", "--set"),
    ("tools/replay.py --run {run} --step 99", "99"),
    ("tools/replay.py --run {tmp}/nothing --step 1", "{tmp}/nothing"),
]
"""Mistakes of a first hour: command, and what its sentence names, which is what was typed (`.*`: anything between)."""
