"""The rules of docs/architecture.md that a machine can check."""

import ast
import re
import statistics

import pytest
from helpers import REPOSITORY

PACKAGE = REPOSITORY / "scratchbn"
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(
    f for d in ("scratchbn", "models", "scripts") for f in (REPOSITORY / d).rglob("*.py")
)
NATIVE = sorted(f for f in (PACKAGE / "native").rglob("*") if f.suffix in (".cc", ".cu", ".h"))
# What Gluon and MXNet keep to themselves, and who may touch it.
PRIVATE = re.compile(
    r"\._(active|cached_graph|cached_op|cached_op_args|children|deferred_init|differentiable"
    r"|forward_hooks|forward_pre_hooks|get_graph|build_cache|in_format|out_format|reduce"
    r"|collect_params_with_prefix|set_trainer|trainer)\b"
)
ADAPTERS = {"_net.py", "_graph/trace.py"}


def name_of(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path, *, at_top):
    """The package's modules that a file imports, at its top or anywhere."""
    tree = ast.parse(path.read_text("utf-8"))
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    nodes = tree.body if at_top else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, node.module or ""]).rstrip(".") if node.level else node.module
            found |= {
                f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module
                for a in node.names
            }
    return {name for name in found if name in MODULES}


def circle_among(edges):
    """A list of modules that import each other in a ring, or None."""
    state, path = {}, []

    def visit(module):
        state[module] = "open"
        path.append(module)
        for other in sorted(edges[module]):
            if state.get(other) == "open":
                return [*path[path.index(other) :], other]
            if other not in state:
                found = visit(other)
                if found:
                    return found
        path.pop()
        state[module] = "done"
        return None

    for module in edges:
        if module not in state:
            found = visit(module)
            if found:
                return found
    return None


def test_no_module_imports_itself_over_others():
    """Imports inside functions and for type checkers included."""
    edges = {
        name: imports_of(path, at_top=False) - {name}
        for name, path in MODULES.items()
        if name != "scratchbn"  # it imports the public names lazily, when they are asked for
    }
    edges = {name: others & edges.keys() for name, others in edges.items()}
    # A package that offers what its modules hold is no dependency of theirs.
    for name, others in edges.items():
        others -= {
            o for o in others if name.startswith(f"{o}.") and MODULES[o].name == "__init__.py"
        }
    assert circle_among(edges) is None


def test_a_circle_is_found():
    assert circle_among({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "path", [*ALL_PYTHON, *NATIVE], ids=lambda p: str(p.relative_to(REPOSITORY))
)
def test_no_file_is_long(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_files_of_the_package_are_short():
    assert statistics.median(len(p.read_text("utf-8").splitlines()) for p in FILES) <= 160


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_of_gluon_are_in_two_files(path):
    if str(path.relative_to(PACKAGE)) in ADAPTERS:
        pytest.skip("an adapter")
    assert PRIVATE.findall(path.read_text("utf-8")) == []


def test_nothing_looks_into_frames():
    words = re.compile(r"_getframe|f_locals|inspect\.stack|currentframe")
    assert [p.name for p in ALL_PYTHON if words.search(p.read_text("utf-8"))] == []


def test_no_module_is_imported_by_a_string():
    """But for the public names, which are imported when they are asked for."""
    users = [p.name for p in FILES if "import_module(" in p.read_text("utf-8")]
    assert users == ["__init__.py"]


def test_no_assert_in_the_package():
    asserting = [
        p.name
        for p in FILES
        if any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(p.read_text())))
    ]
    assert asserting == []


def test_the_public_names_are_documented_once():
    import scratchbn

    assert sorted(scratchbn.__all__) == list(scratchbn.__all__)
    for name in scratchbn.__all__:
        assert getattr(scratchbn, name).__doc__, name


def test_what_a_layer_computes_holds_no_normalization_operator():
    """In training, in inference, as a marker: only operators that are registered for other uses."""
    from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, use_backend
    from scratchbn.variants import BatchRenorm, GhostBatchNorm

    import mxnet as mx

    forbidden = re.compile(
        r"(Batch|Instance|Layer|Group|SyncBatch)Norm|L2Normalization|LRN|moments"
    )
    for layer in (ScratchBatchNorm(), ScratchBatchNormReLU(), GhostBatchNorm(2), BatchRenorm()):
        with use_backend("portable"):
            nodes = ast.literal_eval(
                layer(mx.sym.var("data")).tojson().replace("true", "True").replace("false", "False")
            )["nodes"]
        assert [n["op"] for n in nodes if forbidden.search(n["op"])] == []
