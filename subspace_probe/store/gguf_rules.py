"""The rules by which llama.cpp loads a control vector, applied to a file.

Loader: https://github.com/ggml-org/llama.cpp/blob/master/common/common.cpp (`common_control_vector_load_one`), and
`llama_adapter_cvec::apply` for the width and the layers of the model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from subspace_probe.core.errors import StoreError
from subspace_probe.linalg.finite import all_finite
from subspace_probe.store.gguf_files import GgufFile, GgufTensor, read_gguf

ARCHITECTURE = "controlvector"
HINT, COUNT = f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count"
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_INT_MAX = 2**31 - 1


@final
@dataclass(frozen=True)
class Verification:
    """What llama.cpp would make of a file.

    Attributes:
        errors: why it refuses the file, or computes nothing but nan with it.
        warnings: what it does without saying so, and what other tools stumble over.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether llama.cpp takes the file."""
        return not self.errors


def verify_gguf(path: str | Path, *, n_embd: int | None = None, n_layers: int | None = None) -> Verification:
    """Apply the rules by which llama.cpp loads a control vector, all of them, and say what it does in silence.

    Args:
        path: a file.
        n_embd: width of the model it is meant for; a file of another width is refused by llama.cpp.
        n_layers: number of blocks of that model; vectors beyond the last are never used.

    Raises:
        StoreError: no such file. A file that is damaged or no GGUF is a finding, not an error.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"No file {str(path)!r}. Give the path of a GGUF file.")
    try:
        file = read_gguf(path, prefix="direction.")
    except StoreError as error:
        return Verification((str(error),), ())
    return judge(file, n_embd, n_layers)


def judge(file: GgufFile, n_embd: int | None = None, n_layers: int | None = None) -> Verification:
    """The same for a file that was read."""
    errors: list[str] = []
    notices: list[str] = []
    by_index: dict[int, list[str]] = {}
    for tensor in file.tensors:
        index = index_of(tensor.name)
        errors += _refused(tensor, index)
        by_index.setdefault(-1 if index is None else index, []).append(tensor.name)
        if tensor.values is not None and tensor.size and not tensor.values.any():
            notices.append(f"{tensor.name} is all zeros: it does nothing.")
    if not file.tensors:
        errors.append("There are no tensors.")
    sizes = sorted({tensor.size for tensor in file.tensors})
    if len(sizes) > 1:
        errors.append(f"The vectors have different widths: {', '.join(map(str, sizes))}.")
    elif sizes and n_embd is not None and sizes[0] != n_embd:
        errors.append(f"The vectors have the width {sizes[0]}, the model has {n_embd}.")
    for index, names in sorted(by_index.items()):
        if index >= 0 and len(names) > 1:
            notices.append(f"{' and '.join(names)} are added up at block {index}.")
        if n_layers is not None and index >= n_layers:
            notices.append(f"{names[0]} is never used: the model's last block is {n_layers - 1}.")
    count = file.metadata.get(COUNT)
    if count is not None and count != len(file.tensors):
        notices.append(f"{COUNT} is {count}, but there are {len(file.tensors)} tensors. llama.cpp does not read it.")
    if HINT not in file.metadata:
        notices.append(f"{HINT} is missing. llama.cpp does not read it, but repeng refuses the file.")
    return Verification(tuple(errors), tuple(notices))


def _refused(tensor: GgufTensor, index: int | None) -> list[str]:
    """Why llama.cpp refuses a tensor, and with it the file."""
    name, found = tensor.name, list[str]()
    if index is None:
        found.append(f"{name!r} is not direction.<number>.")
    elif index == 0:
        found.append("direction.0: block 0 cannot be steered.")
    elif index * tensor.size > _INT_MAX:
        found.append(f"{name}: no model has so many blocks.")
    if tensor.type != "F32":
        found.append(f"{name} is {tensor.type}, not F32.")
    if tensor.dims != 1 or not tensor.size:
        found.append(f"{name} has the shape {list(tensor.shape)}, not one row.")
    if tensor.values is not None and not all_finite(tensor.values):
        found.append(f"{name} holds non-finite values.")
    return found


def index_of(name: str) -> int | None:
    """The number behind "direction.", read as C++'s `stoi` reads it: blanks before and anything behind are let pass."""
    start, dot, rest = name.partition(".")
    match = _NUMBER.match(rest) if start == "direction" and dot else None
    number = int(match[1]) if match else -1
    return number if 0 <= number <= _INT_MAX else None
