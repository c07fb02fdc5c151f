"""Names for annotations of shape and dtype: `Float[Tensor, "B L V"]` is a tensor of floats with the axes B, L and V.

Dtypes: `Float` of any width, `Int` signed, `Integer` signed or not, `Bool`.

Axes: B sequences, L positions, V vocabulary entries (or this rank's columns of them), D hidden width, N tokens or other
numbers in one line; `*axes` are any axes, and every axis has one length throughout a signature. `#` marks an axis that
may have length 1 and is broadcast, `...` axes about which nothing is stated.

The tests check every call: `tests/support/shapes.py` puts jaxtyping's names in the place of these. Otherwise they are
`typing.Annotated`, which checks nothing, and jaxtyping need not be installed. `Tensor` is for modules that have to be
imported without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Int
from typing import Annotated as Integer

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

__all__ = ["Bool", "Float", "Int", "Integer", "Tensor"]
