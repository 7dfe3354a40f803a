"""Files of tensors: read without PyTorch and without running anything that they hold, and written as safetensors.

tensors = read("DiT-XL-2-256x256.pt")          # arrays by name, each read from the file when it is asked for
tensors = read("checkpoint.pt", part="ema")    # where a file holds several networks
write("network.safetensors", tensors)

The first bytes of a file tell its format:

(1) safetensors: the length of a header, the header in JSON, and the bytes of all tensors one after another;
(2) PyTorch's zip: a pickle, `data.pkl`, that names storages, each of which is a member of its own, not compressed;
(3) PyTorch's format before 1.6: five pickles, of which the fourth names storages, then all storages, each with its length;
(4) a pickle of modules, as EDM and StyleGAN publish them, with each tensor's storage in format (3) inside.

A pickle is a program for a stack machine that can call any function. PyTorch's own run of it is what makes such files dangerous; here the
machine is written out: names are never looked up, a call makes a record of a tensor or nothing, and a program that names anything else is
refused.
"""

import collections.abc
import dataclasses
import json
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from fmjax import files

__all__ = ["Tensors", "UnsafeFile", "read", "write"]

_HEADER = 100_000_000
"""The most bytes of a safetensors header, as the format says."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles of format (3)."""
_LINE = 1 << 20
"""The most bytes of a line in a pickle."""
_LAYERS = 100_000
"""The most layers and tensors of a module that was pickled."""
_AXES = 64
"""The most axes of an array of NumPy."""

_SAFETENSORS = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64"},
    **{"I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16", "F32": "float32"},
    **{"F64": "float64", "C64": "complex64"},
}
_STORAGES = {
    **{"BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32"},
    **{"LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32"},
    **{"DoubleStorage": "float64", "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8"},
}
_DTYPES = {name: np.dtype(getattr(jnp, name)) for name in _SAFETENSORS.values()}
"""By the names that NumPy, JAX and PyTorch share."""


class UnsafeFile(ValueError):
    """A file that names functions or classes beside tensors; nothing of it was run."""


class Tensors(collections.abc.Mapping):
    """Arrays by name, each read from its file whenever it is asked for: iterate to have one in memory at a time.

    Arrays are in the file's dtype and belong to whoever asked. A file that changed after `read` raises a ValueError.

    Args:
      path: of the file.
      stamp: the size and the time of the file.
      entries: where each tensor is.
      metadata: strings by name that the file holds beside them.
    """

    def __init__(self, path, stamp, entries, metadata=None):
        self._path, self._stamp, self._entries = path, stamp, entries
        self.metadata: dict[str, str] = dict(metadata or {})
        """Strings by name that the file holds beside the tensors."""

    def __getitem__(self, name) -> np.ndarray:
        entry = self._entry(name)
        data = np.empty(entry.bytes, np.uint8)
        with self._path.open("rb") as file:
            if _stamp(file) != self._stamp:
                raise ValueError(f"{self._path} changed since its tensors were listed: read it again.")
            file.seek(entry.start)
            if data.size and file.readinto(data) != data.size:
                raise ValueError(_cut(self._path, self._stamp[0], name, entry))
        array = np.ndarray(entry.shape, entry.dtype, buffer=data, strides=[stride * entry.dtype.itemsize for stride in entry.strides])
        return array if array.flags.c_contiguous else array.copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def __contains__(self, name):
        return name in self._entries

    def __repr__(self):
        return f"Tensors({self._path.name!r}, {len(self)} tensors)"

    def shape(self, name) -> tuple[int, ...]:
        """The shape of a tensor, which is not read.

        Args:
          name: of the tensor.
        Returns:
          Its sides.
        """
        return self._entry(name).shape

    def dtype(self, name) -> np.dtype:
        """The dtype of a tensor, which is not read.

        Args:
          name: of the tensor.
        Returns:
          That of NumPy, or of ml_dtypes for bfloat16 and float8.
        """
        return self._entry(name).dtype

    def under(self, prefix) -> "Tensors":
        """The tensors whose names begin with a prefix, such as "net.", by the rest of their names.

        Args:
          prefix: which is left out.
        Returns:
          Those of the same file.
        Raises:
          ValueError: if there are none.
        """
        entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        if not entries:
            raise ValueError(f"No tensor of {self._path} has a name that begins with {prefix!r}; they are {_shortened(self)}.")
        return Tensors(self._path, self._stamp, entries, self.metadata)

    def _entry(self, name):
        if name not in self._entries:
            raise KeyError(f"{self._path} has no tensor {name!r}; it has {_shortened(self)}.")
        return self._entries[name]


def read(path, part: str | tuple[str, ...] | None = None) -> Tensors:
    """The tensors of a file of PyTorch or safetensors, found by its first bytes.

    Args:
      path: of the file.
      part: the key of the dictionary that holds the tensors, such as "ema" or "state_dict"; where dictionaries are nested, a tuple of keys
        or the keys with dots between them. None takes the tensors at the top, or the only dictionary that holds any.
    Returns:
      A mapping from names to arrays, which reads each when it is asked for; what is no tensor is left out.
    Raises:
      FileNotFoundError: if there is no such file.
      IsADirectoryError: if it is a folder.
      UnsafeFile: if the file names functions or classes beside tensors; nothing of it was run.
      ValueError: if the file is of another kind, cut short or damaged, or holds several dictionaries of tensors and no part is given.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but a file of tensors is expected: name a .safetensors, .pt or .pkl file in it.")
    with path.open("rb") as handle:
        stamp = _stamp(handle)
        whole = _Section(path, handle, 0, stamp[0])
        head = whole.read(256)
        whole.at = 0
        if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _HEADER:
            if part is not None:
                raise ValueError(f"{path} is of safetensors, which have no parts, but part is {part!r}: leave it out, and pick by under().")
            return Tensors(path, stamp, *_safetensors(whole))
        if head.startswith(b"PK\x03\x04"):
            root = _zip(whole)
        elif head.startswith(b"\x80") and _MAGIC.to_bytes(10, "little") in head[:32]:
            root = _legacy(whole)
        elif head.startswith(b"\x80"):
            root = _unpickle(whole, _unknown)
        else:
            raise ValueError(f"{path} {_guess(head)}, but a file of safetensors or PyTorch is expected.")
    found = _named(path, root, part)
    return Tensors(path, stamp, {name: _entry(path, stamp[0], name, tensor) for name, tensor in found.items()})


def write(path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays as safetensors, one in memory at a time; the file is there when it is whole.

    Args:
      path: where to; the folder exists.
      tensors: NumPy or JAX arrays by name, or what `read` gives.
      metadata: strings by name that the file holds beside them.
    Raises:
      ValueError: if a name, a dtype or the metadata is not of the format.
    """
    described_by_strings = isinstance(metadata, Mapping) and all(isinstance(text, str) for pair in metadata.items() for text in pair)
    if metadata is not None and not described_by_strings:
        raise ValueError(f"metadata is {metadata!r}, but it is strings by strings: use json.dumps for others.")
    kinds = {dtype: kind for kind, dtype in _SAFETENSORS.items()}
    described: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name in tensors:
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"A tensor has the name {name!r}, but names are strings other than '__metadata__'.")
        shape, dtype = _described(tensors, name)
        if getattr(dtype, "name", None) not in kinds:
            raise ValueError(f"{name} has dtype {dtype}, but a file holds {', '.join(kinds)}: convert it, or leave it out.")
        described[name] = tuple(int(side) for side in shape), np.dtype(dtype)
    # Wide dtypes first, so that each tensor begins at a multiple of its item's size.
    order = sorted(described, key=lambda name: (-described[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        shape, dtype = described[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER:
        raise ValueError(f"The names and the metadata take {len(text)} bytes, but at most {_HEADER} fit into a file: write several.")
    with files.replacing(path) as new, new.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            shape, dtype = described[name]
            array = np.asarray(tensors[name])
            if array.shape != shape or array.dtype.name != dtype.name:
                raise ValueError(f"{name} was {dtype}{shape}, and then {array.dtype}{array.shape}: give a mapping whose arrays stay.")
            if not array.dtype.isnative:
                array = array.astype(array.dtype.newbyteorder("="))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _described(tensors, name):
    if isinstance(tensors, Tensors):
        return tensors.shape(name), tensors.dtype(name)
    value = tensors[name]
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name} is a {type(value).__name__}, but NumPy or JAX arrays are written: convert it by np.asarray.")
    return value.shape, value.dtype


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a file: strides are in items, and 0 where a side has no second item."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def __post_init__(self):
        # Where a side is 0 the others are in no byte of the file.
        if math.prod(max(side, 1) for side in self.shape) * self.dtype.itemsize >= 2**62:
            raise ValueError(f"a tensor of shape {self.shape} is of more items than any memory holds")

    @property
    def bytes(self):
        """From the first item to the last."""
        items = 1 + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        return items * self.dtype.itemsize if 0 not in self.shape else 0


class _Section:
    """A stretch of a file that is read like a file of its own."""

    def __init__(self, path: Path, file: BinaryIO, start, end, inside=False):
        self.path, self.file, self.at, self.end, self.inside = path, file, start, end, inside

    def read(self, count):
        self.file.seek(self.at)
        data = self.file.read(max(0, min(count, self.end - self.at)))
        self.at += len(data)
        return data

    def readline(self):
        self.file.seek(self.at)
        data = self.file.readline(max(0, min(_LINE, self.end - self.at)))
        self.at += len(data)
        return data

    def tell(self):
        return self.at

    def damaged(self, why):
        return ValueError(f"{self.path} is damaged, or no program that is known here wrote it: {why}. Fetch it again.")


def _stamp(file):
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _cut(path, size, name, entry):
    return f"{name} needs bytes up to {entry.start + entry.bytes}, but {path} has {size}: it was cut short. Fetch it again."


def _shortened(names):
    first = [str(name)[:80] for _, name in zip(range(4), names, strict=False)]
    return f"{', '.join(first)}{f' and {len(names) - len(first)} more' if len(names) > len(first) else ''}" or "none"


def _guess(head):
    if not head:
        return "is empty: the download did not begin"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS in place of the file: run `git lfs pull` where it was cloned"
    if head.lstrip().startswith(b"<"):
        return "is a web page: the link needs a login, or leads to a page about the file"
    if head.lstrip().startswith(b"{"):
        return "is JSON, such as an index of several files: name one of them"
    return f"begins with {head[:8]!r}"


def _safetensors(section):
    """Format (1)."""
    length = int.from_bytes(section.read(8), "little")
    text = section.read(length)
    if len(text) < length:
        raise ValueError(f"{section.path} has a header of {length} bytes, but only {len(text)} of them: it was cut short. Fetch it again.")

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in its header")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=once)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("its metadata are not strings by strings")
        entries = {name: _safetensor(name, section.at, **described) for name, described in header.items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise section.damaged(f"its header is not of safetensors ({error})") from error
    end = section.at
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].bytes)):
        if entry.start != end:
            raise section.damaged(f"{name} begins at byte {entry.start}, but the tensor before it ends at {end}")
        end += entry.bytes
        if end > section.end:
            raise ValueError(_cut(section.path, section.end, name, entry))
    if end < section.end:
        raise section.damaged(f"its tensors end at byte {end}, and the file at {section.end}")
    return entries, metadata


def _safetensor(name, base, *, dtype, shape, data_offsets):
    start, end = data_offsets
    if not isinstance(shape, list) or len(shape) > _AXES:
        raise ValueError(f"the shape of {name} is not a list of at most {_AXES} numbers")
    if dtype not in _SAFETENSORS:
        raise ValueError(f"{name} has dtype {dtype}, but {', '.join(_SAFETENSORS)} are known")
    _require_counts(name, [*shape, start, end])
    entry = _Entry(_DTYPES[_SAFETENSORS[dtype]], tuple(shape), _strides(shape), base + start)
    if end - start != entry.bytes:
        raise ValueError(f"{name} has {end - start} bytes, but {entry.bytes} for its shape {tuple(shape)} of {dtype}")
    return entry


def _require_counts(name, numbers):
    if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise ValueError(f"the shape or the place of {name} is not of whole numbers of at least 0")


def _strides(shape):
    """Those of an array without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) if side > 1 and 0 not in shape else 0 for axis, side in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that a pickle gives; what has this name is never looked up."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"[:200].encode("ascii", "backslashreplace").decode()


@dataclasses.dataclass
class _Bytes:
    """Bytes in a pickle, left in the file."""

    section: _Section
    start: int
    end: int


@dataclasses.dataclass
class _Storage:
    """A run of items; where it starts is known after the pickle that names it."""

    dtype: np.dtype
    count: int
    start: int | None = None

    @property
    def bytes(self):
        return self.count * self.dtype.itemsize


@dataclasses.dataclass
class _Tensor:
    """What a pickle says of a tensor, not checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None
    flags: Any = None


@dataclasses.dataclass
class _Object:
    """What is no tensor, or a module that holds some in its state."""

    state: Any = None


def _inert(*_):
    return _Object()


def _dictionary(*pairs):
    found = {}
    if pairs:
        if not isinstance(pairs[-1], list):
            raise TypeError("a dictionary is made of what is no list of pairs")
        _set(found, [each for key, value in pairs[-1] for each in (key, value)])
        # So that a pickle which calls this with one list again and again has no copies of it.
        pairs[-1].clear()
    return found


def _sides(sides=()):
    if len(sides) > _AXES:
        raise ValueError(f"a shape has {len(sides)} sides, but at most {_AXES} are known")
    return tuple(sides)


def _set(target, items):
    """Entries of a dictionary by pairs of keys and values; only text names tensors."""
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))
    elif not isinstance(target, _Object):
        raise TypeError(f"it sets an entry of a {type(target).__name__}")


def _extend(target, items):
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, _Object):
        raise TypeError(f"it appends to a {type(target).__name__}")


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, flags=None):
    return _Tensor(storage, offset, shape, strides, flags=flags)


def _tensor_of(storage, offset, shape, strides, requires_grad, hooks, dtype, flags=None):
    if not isinstance(dtype, _Name):
        raise TypeError(f"a {type(dtype).__name__} is not a dtype")
    return _Tensor(storage, offset, shape, strides, _DTYPES[dtype.name], flags)


def _typed(function, kind, arguments, state=None):
    if not isinstance(function, _Name) or function.module != "torch._utils":
        raise TypeError("a tensor is made by what makes none")
    return _call(function, arguments)


def _stored(data):
    """A storage inside a pickle of format (4), which is a file of format (3)."""
    if not isinstance(data, _Bytes) or data.section.inside:
        raise TypeError("a storage is not in bytes of its own, as before protocol 3 of pickle")
    storage = _legacy(_Section(data.section.path, data.section.file, data.start, data.end, inside=True))
    if not isinstance(storage, _Storage):
        raise TypeError("a storage holds something else")
    return storage


def _persistent(meta):
    """An object whose source the file holds: its state is enough."""
    return _Object(meta["state"] if isinstance(meta, dict) else None)


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): lambda *_: {},
    ("dnnlib.util", "EasyDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch.storage", "_load_from_bytes"): _stored,
    ("torch", "Size"): _sides,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    **{("torch", name): _inert for name in (*_STORAGES, *_DTYPES, "Tensor", "device")},
    **{("torch.storage", name): _inert for name in ("TypedStorage", "UntypedStorage")},
    **{("torch.nn.parameter", name): _inert for name in ("Parameter", "Buffer")},
    **{(f"numpy.{core}.multiarray", name): _inert for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _inert for core in ("core", "_core")},
    **{("numpy", name): _inert for name in ("dtype", "ndarray")},
    **{(module, "set"): lambda items=(): items for module in ("builtins", "__builtin__")},
    **{(module, "dict"): _inert for module in ("builtins", "__builtin__")},
    ("_codecs", "encode"): _inert,
    ("argparse", "Namespace"): _inert,
}
"""What a pickle may name, and the records that its calls make."""


def _call(function, arguments):
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise TypeError(f"it calls a {type(function).__name__}")
    return _CALLS.get((function.module, function.name), _inert)(*arguments)


def _unknown(key):
    raise TypeError(f"it refers to a {type(key).__name__} outside of it")


def _unpickle(section, persistent):
    """The value of a pickle's program.

    Args:
      section: of the file, read as far as the program goes.
      persistent: what to make of the key of an object that stands outside of the pickle.
    Returns:
      Dictionaries with the entries whose keys are text, lists, tuples, numbers, text, and the records above.
    """
    try:
        return _run(section, persistent)
    except UnsafeFile:
        raise
    # A program that is no program of pickle fails anywhere.
    except (ArithmeticError, LookupError, TypeError, ValueError, Warning) as error:
        if section.at >= section.end:
            raise section.damaged("its pickle has no end, as where a download was cut short") from error
        raise section.damaged(f"its pickle cannot be read at byte {section.at} ({str(error)[:200]})") from error


def _run(section, persistent):
    stack, outer, memo = [], [], {}

    def marked():
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    def called(count):
        return [stack.pop() for _ in range(count)][::-1]

    steps: Any = pickletools.genops(section)
    for opcode, given, _ in steps:
        match opcode.name:
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE" | "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(given)
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(given)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(_Bytes(section, section.at - len(given), section.at))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[given] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "MARK":
                outer.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(called(int(opcode.name[-1]))))
            case "TUPLE":
                items = marked()
                stack.append(tuple(items))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                items = marked()
                stack.append(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = marked()
                stack.append({})
                _set(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = marked()
                _extend(stack[-1], items)
            case "SETITEM":
                items = called(2)
                _set(stack[-1], items)
            case "SETITEMS":
                items = marked()
                _set(stack[-1], items)
            case "GLOBAL":
                stack.append(_name(section, *given.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(section, *called(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*called(2)))
            case "NEWOBJ_EX":
                stack.append(_call(*called(3)[:2]))
            case "INST":
                items = marked()
                stack.append(_call(_name(section, *given.split(" ", 1)), tuple(items)))
            case "OBJ":
                items = marked()
                stack.append(_call(items[0], tuple(items[1:])))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Object):
                    stack[-1].state = state
                elif isinstance(stack[-1], _Name):
                    raise UnsafeFile(_refusal(section.path, f"a change of {stack[-1]}"))
                elif not isinstance(stack[-1], dict | list | _Tensor):
                    raise TypeError(f"it sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "POP":
                stack.pop()
            case "POP_MARK":
                marked()
            case "DUP":
                stack.append(stack[-1])
            case "EXT1" | "EXT2" | "EXT4":
                raise UnsafeFile(_refusal(section.path, f"number {given} of copyreg's extensions"))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"PyTorch writes no {name}")
    raise ValueError("it has no end")


def _name(section, module, name):
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name is not text")
    found = _Name(module, name)
    # The layers of PyTorch, which modules of format (4) have between them.
    if (module, name) not in _CALLS and not (module.startswith("torch.nn.modules.") and name.isidentifier()):
        raise UnsafeFile(_refusal(section.path, str(found)))
    return found


def _refusal(path, what):
    return (
        f"{path} holds {what}, which no dense tensor needs, and a file like it can run any program when pickle loads it: nothing was run. "
        "Save its state_dict alone by PyTorch, or as safetensors."
    )


def _storage(key, view=False):
    """A storage by its key in a pickle: ("storage", class, key, device, count), and in format (3) a view of it."""
    if not isinstance(key, tuple) or len(key) != (6 if view else 5) or key[0] != "storage" or (view and key[5] is not None):
        raise TypeError("it refers to what is no storage")
    _, kind, name, _, count = key[:5]
    if not isinstance(kind, _Name) or kind.name not in _STORAGES or not isinstance(name, str):
        raise TypeError("it refers to a storage of no class")
    _require_counts(f"storage {name}", [count])
    return name, _Storage(_DTYPES[_STORAGES[kind.name]], count)


def _zip(section):
    """Format (2)."""
    path, cut = section.path, "it is a zip file without a directory, which stands at the end, as where a download was cut short"
    try:
        with zipfile.ZipFile(section.file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, ArithmeticError, LookupError, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise section.damaged(cut) from error
    members = {info.filename: info for info in listed}
    tops = [name.removesuffix("/data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(members) < len(listed):
        raise section.damaged("two of its members have one name")
    if len(tops) != 1:
        raise ValueError(f"{path} is a zip file without PyTorch's data.pkl, but a file of tensors is expected: unpack it, and name one.")
    top = tops[0]
    if f"{top}/constants.pkl" in members:
        raise ValueError(f"{path} is a program of TorchScript: load it by torch.jit.load, and save its state_dict as safetensors.")

    def member(name):
        info = members.get(f"{top}/{name}")
        if info is None:
            raise ValueError(f"its member {top}/{name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise ValueError(f"its member {info.filename} is compressed or encrypted, which PyTorch never does")
        header = _Section(path, section.file, info.header_offset, section.end).read(30) if 0 <= info.header_offset < section.end else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"its member {info.filename} is not where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + info.file_size > section.end:
            raise ValueError(f"its member {info.filename} reaches beyond its end")
        return _Section(path, section.file, start, start + info.file_size)

    def persistent(key):
        name, storage = _storage(key)
        if not re.fullmatch(r"\w+", name):
            raise UnsafeFile(_refusal(path, f"a storage by the name {name[:80]!r}"))
        data = member(f"data/{name}")
        storage.start = data.at
        if data.end - data.at != storage.bytes:
            raise ValueError(f"storage {name} has {data.end - data.at} bytes, but {storage.bytes} by the pickle")
        return storage

    try:
        if f"{top}/byteorder" in members and (order := member("byteorder").read(16)) != b"little":
            raise ValueError(f"its numbers are in the byte order {order!r}: save it on a machine whose order is little")
        pickle = member("data.pkl")
    except ValueError as error:
        raise section.damaged(str(error)) from error
    return _unpickle(pickle, persistent)


def _legacy(section):
    """Format (3)."""
    storages = collections.defaultdict(list)

    def persistent(key):
        # A class with its source, which a module was saved with.
        if isinstance(key, tuple) and len(key) == 4 and key[0] == "module" and isinstance(key[1], _Name):
            return key[1]
        name, storage = _storage(key, view=True)
        storages[name].append(storage)
        return storage

    if _unpickle(section, _unknown) != _MAGIC or _unpickle(section, _unknown) != _PROTOCOL:
        raise section.damaged("it does not begin as PyTorch's files do")
    machine = _unpickle(section, _unknown)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise section.damaged("its numbers are not in the byte order little: save it on a machine whose order is")
    root = _unpickle(section, persistent)
    keys = _unpickle(section, _unknown)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise section.damaged("its list of storages is not of those that its pickle names")
    for key in keys:
        start = section.at + 8
        # What is beyond the end is missed when a tensor's name is known.
        count = int.from_bytes(section.read(8), "little", signed=True) if start <= section.end else storages[key][0].count
        for storage in storages[key]:
            storage.start = start
            if storage.count != count or storage.bytes != storages[key][0].bytes:
                raise section.damaged(f"storage {key[:80]} has {count} items, but {storage.count} by the pickle")
        section.at = start + storages[key][0].bytes
    if section.inside and section.at > section.end:
        raise section.damaged("a storage reaches beyond its bytes")
    return root


def _entry(path, size, name, tensor):
    """Where a tensor is, once what the pickle says of it is checked."""
    wrong = f"{name[:200]!r} in {path}"
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    sides = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _AXES
    if not isinstance(storage, _Storage) or storage.start is None or not sides:
        raise ValueError(f"{wrong} has no storage, shape and strides: the file is damaged. Fetch it again.")
    if tensor.flags:
        raise ValueError(f"{wrong} is the conjugate or the negative of what is stored: save it after resolve_conj().resolve_neg().")
    _require_counts(wrong, [tensor.offset, *shape, *strides])
    dtype = tensor.dtype or storage.dtype
    count = storage.bytes // dtype.itemsize
    strides = tuple(stride if side > 1 and 0 not in shape else 0 for side, stride in zip(shape, strides, strict=True))
    entry = _Entry(dtype, shape, strides, storage.start + tensor.offset * dtype.itemsize)
    if tensor.offset * dtype.itemsize + entry.bytes > count * dtype.itemsize or math.prod(shape) > count:
        raise ValueError(
            f"{wrong} has shape {shape}, strides {strides} and offset {tensor.offset}, which reach beyond the {count} items of its "
            "storage: the file is damaged, or the tensor was expanded. Save it after contiguous()."
        )
    if entry.start + entry.bytes > size:
        raise ValueError(_cut(path, size, name, entry))
    return entry


def _named(path, root, part):
    """The tensors of one dictionary in what a pickle made."""
    node, keys = root, part or ()
    if isinstance(part, str):
        keys = (part,) if part in _entries(root) else tuple(part.split("."))
    for key in keys:
        inner = _entries(node)
        if key not in inner:
            raise ValueError(f"{path} has no part {part!r}; where {key!r} is sought, it has {_shortened(inner)}.")
        node = inner[key]
    found = _dictionaries(node)
    if () in found:
        return found[()]
    if len(found) == 1:
        return next(iter(found.values()))
    of = f"{path}, part {part!r}," if part else f"{path}"
    if not found:
        raise ValueError(f"{of} holds no tensors by name, but a dictionary of them is expected, such as a state_dict.")
    listed = ", ".join(f"{'.'.join(keys)!r} ({len(tensors)} tensors)" for keys, tensors in found.items())
    raise ValueError(f"{of} holds several dictionaries of tensors, {listed}: give one of them as part.")


def _dictionaries(root):
    """All dictionaries that hold tensors, by their keys; each once, since a damaged file may hold itself."""
    found, seen, left = {}, set(), [((), root)]
    while left:
        keys, node = left.pop()
        if id(node) in seen or len(keys) > 8:
            continue
        seen.add(id(node))
        entries = _entries(node)
        if tensors := {name: value for name, value in entries.items() if isinstance(value, _Tensor)}:
            found[keys] = tensors
        left += [((*keys, name), value) for name, value in reversed(entries.items()) if isinstance(value, dict | _Object)]
    return found


def _entries(node):
    """What stands under names in a dictionary or a module."""
    if isinstance(node, _Object):
        return _state_dict(node)
    return node if isinstance(node, dict) else {}


def _state_dict(module):
    """The tensors of a module and of those in it, by the names that PyTorch gives them."""
    found, left, count = {}, [("", module)], 0
    while left:
        prefix, module = left.pop()
        state = module.state if isinstance(module, _Object) and isinstance(module.state, dict) else {}
        parameters, buffers, modules = (_entries_of(state, each) for each in ("_parameters", "_buffers", "_modules"))
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, list) else []
        found |= {prefix + name: value for name, value in parameters.items() if isinstance(value, _Tensor)}
        found |= {prefix + name: value for name, value in buffers.items() if isinstance(value, _Tensor) and name not in passing}
        left += [(f"{prefix}{name}.", value) for name, value in reversed(modules.items())]
        count += 1
        # A damaged file may hold itself.
        if count + len(left) + len(found) > _LAYERS or len(prefix) > 2000:
            raise ValueError(f"A network holds itself, or more than {_LAYERS} layers and tensors: the file is damaged. Fetch it again.")
    return found


def _entries_of(state, name):
    return entries if isinstance(entries := state.get(name), dict) else {}
