"""Files of tensors: those that PyTorch wrote, programs that are refused, what is damaged, and what is written."""

import contextlib
import dataclasses
import io
import json
import pickle
import struct
import sys
import tracemalloc
import types
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from official import files as recorded

from fmjax.pretrained import tensors

FILES = ["files_zip.pt", "files_legacy.pt", "files_module.pkl", "files.safetensors"]
PARTS = {"files_zip.pt": "model", "files_legacy.pt": "model"}
X = np.arange(6, dtype=np.float32).reshape(2, 3)
MAGIC = 0x1950A86A20F9469CFC6C


# A pickle by hand: values, and what pickle's own functions would not write.


@dataclasses.dataclass
class Name:
    module: str
    name: str


@dataclasses.dataclass
class Call:
    function: Any
    arguments: Any


@dataclasses.dataclass
class Persistent:
    key: Any


@dataclasses.dataclass
class Opcodes:
    parts: tuple


def code(value):
    """The opcodes that leave a value on the stack."""
    match value:
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(key) + code(entry) for key, entry in value.items()) + b"u"
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return code(function) + code(arguments) + b"R"
        case Persistent(key):
            return code(key) + b"Q"
        case Opcodes(parts):
            return b"".join(part if isinstance(part, bytes) else code(part[0]) for part in parts)
    raise TypeError(value)


def program(value):
    return b"\x80\x02" + code(value) + b"."


def stored(count, key="0", kind="FloatStorage"):
    return Persistent(("storage", Name("torch", kind), key, "cpu", count))


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1)):
    arguments = (stored(6) if storage is None else storage, offset, shape, strides, False, Call(Name("collections", "OrderedDict"), ()))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)


def rewritten(value, change):
    """A value with other storages."""
    match value:
        case Persistent(key):
            return change(key) if isinstance(key, tuple) and key[:1] == ("storage",) else value
        case tuple() | list():
            return type(value)(rewritten(each, change) for each in value)
        case dict():
            return {key: rewritten(each, change) for key, each in value.items()}
        case Call(function, arguments):
            return Call(function, rewritten(arguments, change))
    return value


def as_zip(root, storages=None, compression=zipfile.ZIP_STORED, **others):
    """PyTorch's zip, as bytes."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        archive.writestr("archive/data.pkl", program(root))
        for name, data in {"byteorder": b"little", **others}.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in [("0", X.tobytes())] if storages is None else storages:
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def as_legacy(root, storages=None, little=True, keys=None):
    """PyTorch's format before 1.6, as bytes."""
    storages = {"0": X.tobytes()} if storages is None else storages

    machine = {"protocol_version": 1001, "little_endian": little}
    head = b"".join(
        map(
            program, (MAGIC, 1001, machine, rewritten(root, lambda key: Persistent((*key, None))), list(storages) if keys is None else keys)
        )
    )
    return head + b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values())


def as_pickle(root):
    """As EDM's files are, where each storage is a file of PyTorch inside."""

    def inside(key):
        return Call(Name("torch.storage", "_load_from_bytes"), (as_legacy(Persistent(key)),))

    return program(rewritten(root, inside))


FORMATS = {"zip": as_zip, "legacy": as_legacy, "pickle": as_pickle}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.pt"


def read(file, data, part=None):
    file.write_bytes(data)
    return tensors.read(file, part)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def expected(name, part):
    if name == "files_module.pkl":
        return official.weights(recorded.MODULE)
    arrays = recorded.arrays(seed=int(part == "ema"))
    return {each: value.astype(jnp.dtype(recorded.DTYPES.get(each, "float32"))) for each, value in arrays.items()}


# Files that PyTorch, EDM and safetensors wrote.


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *[(name, part) for name in FILES[:2] for part in ("model", "ema", ("model",))],
        *[("files_module.pkl", "ema"), ("files_module.pkl", None), ("files.safetensors", None)],
    ],
)
def test_official_files(name, part):
    found, want = tensors.read(official.FOLDER / name, part), expected(name, part)
    assert list(found) == list(want) if name != "files.safetensors" else set(found) == set(want)
    assert repr(found) == f"Tensors('{name}', {len(want)} tensors)"
    for each, value in want.items():
        assert (found.shape(each), found.dtype(each)) == (value.shape, value.dtype)
        assert same(found[each], value), each
        assert found[each].flags.c_contiguous
        assert found[each].flags.writeable


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_of_several_networks_lists_them(name):
    with pytest.raises(
        ValueError, match=r"dictionaries of tensors, 'model' \(11 tensors\), 'ema' \(11 tensors\): give one of them as part"
    ):
        tensors.read(official.FOLDER / name)
    with pytest.raises(ValueError, match=r"no part 'net'; where 'net' is sought, it has model, ema, opt, args and 5 more"):
        tensors.read(official.FOLDER / name, "net")
    with pytest.raises(ValueError, match="part 'args', holds no tensors by name"):
        tensors.read(official.FOLDER / name, "args")


def test_the_only_dictionary_of_tensors_is_taken(file):
    assert list(read(file, as_zip({"state_dict": {"w": tensor()}, "epoch": 3}))) == ["w"]
    assert list(read(file, as_zip({"w": tensor(), "ema": {"v": tensor()}, "epoch": 3}))) == ["w"]
    with pytest.raises(ValueError, match="holds no tensors by name, but a dictionary of them is expected"):
        read(file, as_zip({"epoch": 3}))
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read(file, as_zip(tensor()))


@pytest.mark.parametrize("part", ["train.ema", ("train", "ema")])
def test_parts_of_parts(file, part):
    root = {"train": {"ema": {"w": tensor()}, "net": {"v": tensor()}}, "train.net": {"u": tensor()}}
    assert list(read(file, as_zip(root), part)) == ["w"]
    assert list(read(file, as_zip(root), "train.net")) == ["u"]
    assert list(read(file, as_zip(root), ("train", "net"))) == ["v"]


@pytest.mark.parametrize("form", FORMATS)
def test_files_by_hand(file, form):
    found = read(
        file, FORMATS[form]({"w": tensor(), "v": tensor(shape=(3, 2), strides=(1, 3)), "u": tensor(offset=1, shape=(), strides=())})
    )
    assert same(found["w"], X)
    assert same(found["v"], np.ascontiguousarray(X.T))
    assert same(found["u"], X[0, 1])


def test_names_under_a_prefix():
    found = tensors.read(official.FOLDER / "files_module.pkl").under("inner.first.")
    assert list(found) == ["weight", "bias"]
    assert same(found["bias"], expected("files_module.pkl", None)["inner.first.bias"])
    with pytest.raises(ValueError, match=r"files_module.pkl has a name that begins with 'net\.'; they are weight, count, inner"):
        tensors.read(official.FOLDER / "files_module.pkl").under("net.")


def test_an_unknown_name_says_which_there_are():
    found = tensors.read(official.FOLDER / "files_module.pkl")
    assert "nothing" not in found
    with pytest.raises(KeyError, match="has no tensor 'nothing'; it has weight, count, inner"):
        found["nothing"]
    with pytest.raises(KeyError, match="has no tensor 'nothing'"):
        found.shape("nothing")


# What is no tensor.


def attacks(marker):
    """Programs by what they try; whoever runs them makes the marker."""
    touch, run = f"touch '{marker}'", f"__import__('pathlib').Path({str(marker)!r}).touch()"
    system, evaluate = Name("posix", "system"), Call(Name("builtins", "eval"), (run,))
    getter = Call(Name("builtins", "getattr"), (Name("posix", "__class__"), "system"))
    dotted = Opcodes((("torch._utils",), ("os.system",), b"\x93"))
    persistent = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
    meta = {"type": "class", "version": 6, "module_src": run, "class_name": "N", "state": {"_parameters": {"w": evaluate}}}
    return {
        "os.system": Call(Name("os", "system"), (touch,)),
        "posix.system": Call(system, (touch,)),
        "eval": evaluate,
        "exec": Call(Name("builtins", "exec"), (run,)),
        "exec of Python 2": Call(Name("__builtin__", "exec"), (run,)),
        "in a tensor": tensor(storage=evaluate),
        "in a shape": tensor(shape=evaluate),
        "as a key of a storage": Persistent(evaluate),
        "as a key": Opcodes((b"}", (evaluate,), (1,), b"s")),
        "nested": Call(Name("collections", "OrderedDict"), ([("w", Call(Name("builtins", "list"), (evaluate,)))],)),
        "partial": Call(Call(Name("functools", "partial"), (system, touch)), ()),
        "map": Call(Name("builtins", "map"), (system, [touch])),
        "getattr": Call(getter, (touch,)),
        "dotted": Call(dotted, (touch,)),
        "dotted in a layer's module": Call(Opcodes((("torch.nn.modules.module",), ("torch.os.system",), b"\x93")), (touch,)),
        "dotted in a line": Call(Name("torch", "serialization.os.system"), (touch,)),
        "new": Opcodes(((Name("builtins", "map"),), ((system, [touch]),), b"\x81")),
        "new with keywords": Opcodes(((Name("builtins", "map"),), ((system, [touch]),), ({},), b"\x92")),
        "instance": Opcodes((b"(", (touch,), b"iposix\nsystem\n")),
        "object": Opcodes((b"(", (system,), (touch,), b"o")),
        "thrown away": Opcodes(((evaluate,), b"0", ({"w": tensor()},))),
        "before a mark": Opcodes((b"(", (evaluate,), b"1", ({"w": tensor()},))),
        "state of a name": Opcodes(((Name("collections", "OrderedDict"),), ({"__reduce__": 1},), b"b")),
        "slots of a name": Opcodes(((Name("argparse", "Namespace"),), ((None, {"__setattr__": system}),), b"b")),
        "extension": Opcodes((b"\x82\x01", ((touch,),), b"R")),
        "extension of 4 bytes": Opcodes((b"\x84\x01\x00\x00\x00", ((touch,),), b"R")),
        "import": Call(Name("importlib", "import_module"), ("this",)),
        "numpy": Call(Name("numpy.testing._private.utils", "runstring"), (run, {})),
        "load": Call(Name("torch", "load"), (str(marker),)),
        "class of a module": Call(Name("torch.jit", "load"), (str(marker),)),
        "another storage": Call(Name("torch", "CudaStorage"), (1,)),
        "source and a call": Call(persistent, (meta,)),
        "inside a storage": Call(Name("torch.storage", "_load_from_bytes"), (as_legacy(evaluate),)),
    }


RUN = "os.system", "posix.system", "eval", "exec", "nested", "thrown away", "before a mark", "instance", "object"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", attacks("marker"))
def test_programs_are_refused_and_not_run(tmp_path, name, form):
    marker, file = tmp_path / "marker", tmp_path / "file.pt"
    attack = attacks(marker)[name]
    with pytest.raises(tensors.UnsafeFile, match=r"file\.pt holds .*: nothing was run\. Save its state_dict alone"):
        read(file, FORMATS[form](attack))
    with pytest.raises(tensors.UnsafeFile):
        read(file, FORMATS[form]({"model": {"w": tensor()}, "more": attack}), part="model")
    assert not marker.exists()


@pytest.mark.parametrize("name", RUN)
def test_the_programs_do_what_they_try(tmp_path, name):
    """Else that they were not run would say nothing."""
    marker = tmp_path / "marker"
    attack = attacks(marker)[name]
    with contextlib.suppress(Exception):
        pickle.loads(program(attack))
    assert marker.exists()


def test_source_in_a_file_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    state = {"_parameters": OrderedDict(w=tensor()), "_buffers": {}, "_modules": {}}
    meta = {"type": "class", "version": 6, "module_src": f"open({str(marker)!r}, 'w').close()", "class_name": "N", "state": state}
    network = Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))
    assert same(read(tmp_path / "file.pkl", as_pickle({"ema": network}))["w"], X)
    assert not marker.exists()


def test_admitted_names_are_never_looked_up(file, monkeypatch):
    """Also where PyTorch is installed."""

    class Trap(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(name)

    for name in ("torch", "torch._utils", "torch.storage", "torch.nn.modules.container", "argparse", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, Trap(name))
    made = [
        Call(Name(*each), ())
        for each in [("argparse", "Namespace"), ("dnnlib.util", "EasyDict"), ("torch.nn.modules.container", "ModuleDict")]
    ]
    others = {str(i): Opcodes(((call,), ({"lr": 1, "__class__": Name("torch", "Size")},), b"b")) for i, call in enumerate(made)}
    found = read(file, as_zip({"w": tensor(), **others}))
    monkeypatch.undo()
    assert same(found["w"], X)
    assert list(found) == ["w"]


ODD = {
    "an empty stack": Opcodes((b"0",)),
    "a mark that is missing": Opcodes((b"t",)),
    "a memo that is missing": Opcodes((b"h\x07",)),
    "a tuple of too few": Opcodes(((1,), b"\x87")),
    "a key without a value": Opcodes((b"}(", ("w",), b"u")),
    "an entry of a number": Opcodes(((1,), ("w",), (2,), b"s")),
    "an item of a number": Opcodes(((1,), (2,), b"a")),
    "a state of a number": Opcodes(((1,), ({},), b"b")),
    "a call of a number": Call(1, ()),
    "a call of text": Call("os.system", ("true",)),
    "a call with a list": Call(Name("collections", "OrderedDict"), []),
    "a dictionary of a tuple": Call(Name("collections", "OrderedDict"), ((("a", 1),),)),
    "a shape of a hundred sides": Call(Name("torch", "Size"), ([1] * 100,)),
    "a call of a tensor": Call(Name("torch._utils", "_rebuild_tensor_v2"), (1,)),
    "a call of a wrong tensor": Call(Name("torch._utils", "_rebuild_tensor_v3"), (1, 2, 3, 4, 5, 6, (), ())),
    "a typed tensor of a type": Call(Name("torch._tensor", "_rebuild_from_type_v2"), (Name("torch", "Size"), 1, ((1,),), {})),
    "names that are numbers": Opcodes(((1,), (2,), b"\x93")),
    "no bytes of a storage": Call(Name("torch.storage", "_load_from_bytes"), ("0",)),
    "another file in a storage": Call(Name("torch.storage", "_load_from_bytes"), (as_legacy({"w": tensor()}),)),
    "a storage in a storage": Call(
        Name("torch.storage", "_load_from_bytes"), (as_legacy(Call(Name("torch.storage", "_load_from_bytes"), (b"",))),)
    ),
    "more bytes than there are": Opcodes((b"\x8e" + struct.pack("<Q", 2**62),)),
    "more text than there is": Opcodes((b"\x8d" + struct.pack("<Q", 2**63 + 1),)),
    "a buffer apart": Opcodes((b"\x97",)),
    "a key in text": Opcodes((b"Pkey\n",)),
    "an opcode that is none": Opcodes((b"\xff",)),
    "an escape that is none": Opcodes((b"S'\\q'\n",)),
    "a number that is none": Opcodes((b"I1x\n",)),
    "a number of many digits": Opcodes((b"L" + b"9" * 5000 + b"L\n",)),
    "text that is none": Opcodes((b"X\x01\x00\x00\x00\xff",)),
}


def test_a_list_is_not_copied_again_and_again(file):
    # A hundred thousand dictionaries would be gigabytes of a file that has one list.
    call = code(Name("collections", "OrderedDict")) + b"h\x01\x85R"
    pairs = b"]q\x01(" + b"".join(code([str(i), i]) for i in range(20_000)) + b"e0"
    bomb = Opcodes((pairs, b"]", *(call + b"a" for _ in range(200))))
    data = as_zip({"w": tensor(), "others": bomb})
    tracemalloc.start()
    found = read(file, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(found) == ["w"]
    assert peak < 100 * len(data)


@pytest.mark.parametrize("name", ODD)
def test_pickles_that_are_none_say_so(file, name):
    with pytest.raises(ValueError, match=r"file\.pt is damaged, or no program that is known here wrote it: its pickle"):
        read(file, as_zip(ODD[name]))


@pytest.mark.parametrize(
    "key",
    [1, "0", (), ("storage",), ("other", Name("torch", "FloatStorage"), "0", "cpu", 6), ("storage", "FloatStorage", "0", "cpu", 6)]
    + [
        ("storage", Name("torch", kind), key, "cpu", count)
        for kind, key, count in [("Size", "0", 6), ("FloatStorage", 0, 6), ("FloatStorage", "1", 6)]
    ]
    + [("storage", Name("torch", "FloatStorage"), "0", "cpu", count) for count in (5, 7, -6, 2**70, True, "6", 6 * 4)],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_keys_of_storages_that_are_none(file, key, form):
    if form == "legacy" and not isinstance(key, tuple):
        key = (key,)
    with pytest.raises(ValueError, match="is damaged, or no program"):
        read(file, FORMATS[form]({"w": tensor(storage=Persistent(key))}))


@pytest.mark.parametrize("key", ["../x", "a/b", "..", ".", "", "/etc/passwd", "a\\b", "a\0b"])
def test_storages_stay_inside_their_file(file, key):
    with pytest.raises(tensors.UnsafeFile, match="holds a storage by the name"):
        read(file, as_zip({"w": tensor(storage=stored(6, key))}, {"0": X.tobytes(), "../x": X.tobytes()}.items()))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        *[(0, (2**40,), (1,)), (0, (2**40,), (0,)), (0, (7,), (0,)), (0, (2, 3), (2**40, 1)), (0, (2,), (6,)), (1, (2, 3), (3, 1))],
        *[(-1, (2, 3), (3, 1)), (0, (-2, 3), (3, 1)), (0, (2, 3), (-3, 1)), (2**70, (1,), (1,)), (0, (2**70,), (1,)), (0, (2, 3), (3,))],
        *[(0, ("2", 3), (3, 1)), (True, (2, 3), (3, 1)), (0, [2, 3], [3, 1]), (0, 6, 1), (0, (1,) * 65, (1,) * 65), (None, (2, 3), (3, 1))],
        (7, (0,), (1,)),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_tensors_stay_inside_their_storage(file, form, offset, shape, strides):
    with pytest.raises(ValueError, match=r"'w' in .*file\.pt|place of 'w' in"):
        read(file, FORMATS[form]({"w": tensor(offset=offset, shape=shape, strides=strides)}))


def test_a_file_that_holds_itself(file):
    """Dictionaries, modules, and many that are the same: found in no time, or refused."""
    found = read(file, as_zip(Opcodes((b"}q\x00(", ("w",), (tensor(),), ("self",), b"h\x00u"))))
    assert list(found) == ["w"]
    layer = Opcodes(((Call(Name("torch.nn.modules.container", "Sequential"), ()),), b"q\x00}(", ("_modules",), b"}(", ("a",), b"h\x00uub"))
    with pytest.raises(ValueError, match="holds itself"):
        read(file, as_zip(layer))
    parts = [b"}q\x00(", ("w",), (tensor(),), b"u"]
    for i in range(40):
        parts += [b"}" + f"q{chr(i + 1)}(".encode(), ("a",), f"h{chr(i)}".encode(), ("b",), f"h{chr(i)}u".encode()]
    with pytest.raises(ValueError, match="holds no tensors"):
        read(file, as_zip(Opcodes(tuple(parts))))


# What is damaged, or of another kind.


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_is_never_wrong(tmp_path, name):
    data, want = (official.FOLDER / name).read_bytes(), expected(name, "model")
    places = sorted({*range(0, len(data), 97), *range(0, 40), *range(len(data) - 40, len(data))})
    refused = 0
    for place in places:
        try:
            found = read(tmp_path / name, data[:place], PARTS.get(name))
        except ValueError:
            refused += 1
            continue
        # What is cut is not of this part.
        assert found.keys() == want.keys()
        assert all(same(found[each], value) for each, value in want.items())
    assert refused == len(places) if name != "files_legacy.pt" else refused > len(places) / 2


def test_what_is_cut_short_has_a_name(file):
    data = as_legacy({"first": tensor(), "second": tensor(storage=stored(6, "1"))}, {"0": X.tobytes(), "1": X.tobytes()})
    with pytest.raises(ValueError, match=rf"^second needs bytes up to {len(data)}, but .*file\.pt has {len(data) - 1}: it was cut short"):
        read(file, data[:-1])
    with pytest.raises(ValueError, match=r"^first needs bytes up to"):
        read(file, data[:-33])
    tensors.write(file, {"first": X, "second": X})
    data = file.read_bytes()
    with pytest.raises(ValueError, match=rf"^second needs bytes up to {len(data)}, but .*file\.pt has {len(data) - 1}: it was cut short"):
        read(file, data[:-1])
    with pytest.raises(ValueError, match="a zip file without a directory, which stands at the end, as where a download was cut short"):
        read(file, as_zip({"w": tensor()})[:-30])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_raises_no_other_error(tmp_path_factory, name, changes):
    data = bytearray((official.FOLDER / name).read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    file = tmp_path_factory.getbasetemp() / name
    with contextlib.suppress(ValueError):
        found = read(file, bytes(data), PARTS.get(name))
        for each in found:
            assert found[each].nbytes <= len(data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_program_is_read_or_refused(tmp_path_factory, data):
    with contextlib.suppress(ValueError):
        read(tmp_path_factory.getbasetemp() / "any.pt", as_zip(Opcodes((({"w": tensor()},), data))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: the download did not begin"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS .*: run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page: the link needs a login"),
        (b'{"weight_map": {}}', "is JSON, such as an index of several files"),
        (b"\x93NUMPY\x01\x00", r"begins with b'\\x93NUMPY\\x01\\x00', but a file of safetensors or PyTorch is expected"),
        (struct.pack("<Q", 2**40) + b'{"w":', "begins with"),
    ],
)
def test_files_of_other_kinds(file, data, message):
    with pytest.raises(ValueError, match=message):
        read(file, data)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tensors.read(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError, match=r"is a folder, but a file of tensors is expected: name a \.safetensors"):
        tensors.read(tmp_path)


def test_other_zip_files(file):
    np.savez(file.with_suffix(".npz"), X)
    with pytest.raises(ValueError, match=r"is a zip file without PyTorch's data\.pkl"):
        tensors.read(file.with_suffix(".npz"))
    with pytest.raises(ValueError, match="is a program of TorchScript"):
        read(file, as_zip({"w": tensor()}, **{"constants.pkl": b"", "code/net.py": b""}))
    with pytest.raises(ValueError, match=r"member archive/.* is compressed or encrypted"):
        read(file, as_zip({"w": tensor()}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="in the byte order b'big': save it on a machine"):
        read(file, as_zip({"w": tensor()}, byteorder=b"big"))
    with pytest.raises(ValueError, match="not in the byte order little"):
        read(file, as_legacy({"w": tensor()}, little=False))
    with pytest.raises(ValueError, match="two of its members have one name"):
        read(file, as_zip({"w": tensor()}, [("0", X.tobytes()), ("0", X.tobytes())]))
    with pytest.raises(ValueError, match="its list of storages is not of those that its pickle names"):
        read(file, as_legacy({"w": tensor()}, keys=["0", "0"]))


def test_a_conjugate_is_not_what_is_stored(file):
    conjugate = tensor(storage=stored(3, kind="ComplexFloatStorage"), shape=(3,), strides=(1,))
    conjugate.arguments += ({"conj": True},)
    with pytest.raises(ValueError, match="is the conjugate or the negative of what is stored"):
        read(file, as_zip({"w": conjugate}))


def test_a_file_that_changed_is_read_again(file):
    tensors.write(file, {"w": X})
    found = tensors.read(file)
    tensors.write(file, {"w": X, "v": X})
    with pytest.raises(ValueError, match="changed since its tensors were listed: read it again"):
        found["w"]


# safetensors.


def header(described, data=None):
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + (X.tobytes() if data is None else data)


W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header({"w": W | {"dtype": "F4"}}), "w has dtype F4, but BOOL, U8, .* are known"),
        (header({"w": W | {"shape": [2, 4]}}), r"w has 24 bytes, but 32 for its shape \(2, 4\) of F32"),
        (header({"w": W | {"shape": [-2, -3]}}), "is not of whole numbers of at least 0"),
        (header({"w": W | {"shape": [2, True]}}), "is not of whole numbers of at least 0"),
        (header({"w": W | {"shape": [2**40, 0, 3]}}), "w has 24 bytes, but 0"),
        (header({"w": W | {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, b""), "is of more items than any memory holds"),
        (header({"w": W | {"shape": [1] * 65}}), "is not a list of at most 64"),
        (header({"w": W | {"data_offsets": [4, 28]}}, bytes(28)), "w begins at byte .*, but the tensor before it ends at"),
        (header({"w": W, "v": W}), "begins at byte .*, but the tensor before it ends at"),
        (header({"w": W}, bytes(25)), r"its tensors end at byte \d+, and the file at"),
        (header({"w": W}, bytes(23)), r"^w needs bytes up to \d+, but"),
        (header(b'{"w": 1, "w": 1}'), "a name stands twice in its header"),
        (header(b'{"w": ' + b"[" * 100_000), "its header is not of safetensors"),
        (header(b'{"w": [}'), "its header is not of safetensors"),
        (header(b'{"w": "\xff"}'), "its header is not of safetensors"),
        (header({"w": W | {"more": 1}}), "its header is not of safetensors"),
        (header({"w": [1]}), "its header is not of safetensors"),
        (header({"w": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}), "its header is not of safetensors"),
        (struct.pack("<Q", 1000) + b'{"w":', "a header of 1000 bytes, but only 5 of them: it was cut short"),
    ],
)
def test_headers_of_safetensors_that_are_none(file, data, message):
    with pytest.raises(ValueError, match=message):
        read(file, data)


def test_safetensors_have_no_parts(file):
    with pytest.raises(ValueError, match="is of safetensors, which have no parts, but part is 'ema'"):
        read(file, header({"w": W}), "ema")
    assert same(read(file, header({"__metadata__": {"a": "b"}, "w": W}))["w"], X)


DTYPES = [dtype for name, dtype in tensors._DTYPES.items() if name != "bool"]


@st.composite
def trees(draw):
    found = {}
    for name in draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        bits = draw(st.binary(min_size=8, max_size=8))
        size = int(np.prod(shape)) * dtype.itemsize
        array = np.frombuffer((bits * size)[:size], dtype).reshape(shape)
        found[name] = array.T if draw(st.booleans()) else array
    return {name: array for name, array in found.items() if name != "__metadata__"}


@settings(max_examples=60, deadline=None)
@given(trees())
def test_what_is_written_is_read(tmp_path_factory, arrays):
    file = tmp_path_factory.getbasetemp() / "written.safetensors"
    tensors.write(file, arrays)
    found = tensors.read(file)
    assert found.keys() == arrays.keys()
    assert all(same(found[name], array) for name, array in arrays.items())
    again = file.with_name("again.safetensors")
    tensors.write(again, found, {})
    assert again.read_bytes() == file.read_bytes()
    tensors.write(again, dict(reversed(arrays.items())))
    assert again.read_bytes() == file.read_bytes()


def test_arrays_of_jax_and_of_other_byte_orders_are_written(file):
    tensors.write(
        file, {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": X.astype(">f4"), "c": np.array([True, False])}, {"format": "pt", "ü": "é"}
    )
    found = tensors.read(file)
    assert [found.dtype(name).name for name in "abc"] == ["bfloat16", "float32", "bool"]
    assert same(found["b"], X)
    assert same(found["a"], np.arange(3).astype(jnp.bfloat16))
    size = int.from_bytes(file.read_bytes()[:8], "little")
    assert size % 8 == 0
    assert json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"] == {"format": "pt", "ü": "é"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w": np.array([None])}, "w has dtype object, but a file holds bool, uint8"),
        ({"w": np.array(["text"])}, "w has dtype <U4, but"),
        ({"w": np.zeros(1, "f4,f4")}, "w has dtype .*, but"),
        ({"w": jax.random.key(0)}, "w has dtype key<fry>, but"),
        ({"w": [1.0]}, "w is a list, but NumPy or JAX arrays are written"),
        ({1: X}, "A tensor has the name 1, but names are strings"),
        ({"__metadata__": X}, "A tensor has the name '__metadata__'"),
    ],
)
def test_what_is_not_written(file, given, message):
    file.write_text("before")
    with pytest.raises(ValueError, match=message):
        tensors.write(file, given)
    for metadata in ({"step": 3}, ["step"], "step"):
        with pytest.raises(ValueError, match="it is strings by strings"):
            tensors.write(file, {"w": X}, metadata)
    assert file.read_text() == "before"


def test_a_failed_write_leaves_the_file_as_it_was(file):
    class Failing(dict):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            if self.reads == 4:
                raise OSError("the disk is gone")
            return super().__getitem__(name)

    tensors.write(file, {"w": X})
    with pytest.raises(OSError, match="the disk is gone"):
        tensors.write(file, Failing(a=X, b=X))
    assert same(tensors.read(file)["w"], X)
    assert [each.name for each in file.parent.iterdir()] == ["file.pt"]


# Memory.


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Of files of 4 GB, of which the disk holds a few bytes."""
    large = 2**30
    described = {"large": {"dtype": "F32", "shape": [large], "data_offsets": [0, 4 * large]}}
    described["small"] = {"dtype": "F32", "shape": [3], "data_offsets": [4 * large, 4 * large + 12]}
    one, other = tmp_path / "one.safetensors", tmp_path / "other.pt"
    with one.open("wb") as file:
        file.write(header(described, b""))
        file.seek(4 * large, 1)
        file.write(X[0].tobytes())
    roots = {"large": tensor(stored(large), 0, (large,), (1,)), "small": tensor(stored(3, "1"), 0, (3,), (1,))}
    with other.open("wb") as file:
        file.write(as_legacy(roots, {}, keys=["0", "1"]) + struct.pack("<q", large))
        file.seek(4 * large, 1)
        file.write(struct.pack("<q", 3) + X[0].tobytes())
    for path in (one, other):
        tracemalloc.start()
        try:
            found = tensors.read(path)
            assert same(found["small"], X[0])
            assert "large" in found
            assert found.shape("large") == (large,)
            assert tracemalloc.get_traced_memory()[1] < 2e6
        finally:
            tracemalloc.stop()


def test_writing_takes_the_memory_of_one_tensor(tmp_path):
    size = 2**20
    tensors.write(tmp_path / "one", {str(i): np.zeros(size, np.uint8) for i in range(8)})
    found = tensors.read(tmp_path / "one")
    tracemalloc.start()
    try:
        tensors.write(tmp_path / "two", found)
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
