"""The optimizer family: how gradients become updates, one module a member, found by `optimizer.name`.

A member is a module here, named by its file, or a module of the user's own, named by its dotted path. It provides:

    class Settings(Section): ...
        The member's own keys beside the common ones under `optimizer:`. Optional. A field `eps` is scaled for
        CompleteP and for `eps_calibration` before it reaches the groups; every other field is the member's own.
    STATE_KEYS: tuple[str, ...] = ("exp_avg",)
        Names of the float32 tensors of a parameter's shape that the optimizer keeps in `state[parameter]`, and `step`
        if it keeps a scalar there that counts steps. Left out where there are none.
    ROLE_STATE_KEYS: dict[str, tuple[str, ...]] = {"hidden": ("exp_avg", "step")}
        The part of STATE_KEYS that is kept for parameters of a role (`hidden` for the blocks' matrices, `embedding`,
        `head`, `norm` or `bias`), where it is not all of them. Checkpoints and estimates of memory follow it.
    ROLE_SETTINGS: dict[str, tuple[str, ...]] = {"hidden": ("momentum",)}
        Names of the member's own settings that decide the updates of a role, where it is not all of them; `--check`
        prints these, and `eps` only for roles that use it.
    GROUP_STATE_KEYS: tuple[str, ...] = ()
        Names of the values in `param_groups` that a step changes and a resume needs. `step` may be left out.
    ELEMENTWISE: bool = True
        Whether an element of a tensor is updated by that element's values alone. If not, the optimizer cannot be used
        where tensors are cut over ranks (`parallel.distributed_optimizer`, `parallel.tensor`), unless `GATHERS`.
    GATHERS: bool = False
        Whether it puts the pieces of cut tensors together itself, with `megadiff.optim.pieces`, as `muon` does.
    def build(groups, settings) -> torch.optim.Optimizer
        The optimizer over parameter groups, each with its `params`, `lr`, `weight_decay` and, if there is a setting
        `eps`, `eps`. Before every step each group's `lr` is set for that step.
    def initial_state(parameter, group) -> dict[str, Tensor]
        State of a parameter before its first step. Optional; zeros of the declared keys unless it is given.
    def kernel(optimizer) -> str
        Name of the kernel of an optimizer that was built, for the log. Optional.

At the start of a run the member takes a few steps on tiny tensors (`megadiff.optim.probe`), so that state that is not
declared, or that a checkpoint cannot hold, is refused before training. `megadiff.testing.check_optimizer` is the same
for a test suite, and more.
"""
