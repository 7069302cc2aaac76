"""The hot path orders work by events alone: no synchronize, no allocation, no move, no lock held while bytes move.

ruff bans what it can name by its full path (pyproject.toml). Calls on objects are looked for here, in the syntax trees
of the modules that run at every layer visit. What is allowed stands in a table, with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lema"
HOT_MODULES = (
    "runtime/events",
    "runtime/host_store",
    "runtime/slots",
    "runtime/prefetcher",
    "runtime/streamer",
    "layer/recompute",
    "layer/replay",
    "layer/layer_proxy",
    "layer/layer_weights",
    "layer/visit_arguments",
    "layer/boundaries",
    "layer/joint_casts",
    "layer/kept_graph",
    "layer/piece_draws",
)

METHODS = {"synchronize", "record_stream", "to", "cpu", "cuda", "item", "tolist", "pin_memory", "clone", "contiguous"}
FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "rand", "randn", "arange", "cat", "stack"}
FACTORIES |= {f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")}
DEVICE_WORK = {"copy_", "read_into", "synchronize", "fill_", "zero_", "result", "submit"}

# (module, function, call) -> why it is no harm.
ALLOWED: dict[tuple[str, str, str], str] = {
    ("runtime/events", "CopyStream.synchronize", "synchronize"): "end of a life, never a step",
    ("runtime/events", "DeviceEvent.synchronize", "synchronize"): "who calls it is judged where it is called",
    (
        "runtime/host_store",
        "StagingRing.claim",
        "synchronize",
    ): "blocks only the prefetch thread, until a window is free",
    ("runtime/host_store", "StagingRing.close", "synchronize"): "end of a life",
    ("layer/layer_weights", "LayerWeights.detach", "clone"): "end of a life: the model is unwrapped",
    ("runtime/slots", "SlotPool.__init__", "torch.empty"): "all device buffers are made here, once",
    ("runtime/prefetcher", "Prefetcher.close", "synchronize"): "end of a life",
    ("runtime/streamer", "_Resident.__init__", "torch.empty"): "once for each resident layer, between steps",
    ("layer/recompute", "Visit._joined", "torch.cat"): "the gradient that a cut visit hands on, once a visit",
    ("layer/recompute", "Visit.run_kept", "torch.cat"): "the output that a cut visit hands on, once a visit",
    ("layer/recompute", "_with_hidden", "torch.zeros_like"): "where nothing leads to a piece's input",
    ("layer/replay", "_Saving.is_in_force", "torch.zeros"): "only after an interrupt",
    ("layer/layer_weights", "LayerWeights.copied", "clone"): "once for each kept layer, at its first visit",
    ("layer/joint_casts", "JointCasts.__init__", "torch.empty_like"): "casts, which autocast would make one by one",
    ("layer/joint_casts", "JointCasts.joined", "torch.empty_like"): "gradients, which autograd would make one by one",
    ("layer/piece_draws", "PieceDraws._draw", "torch.empty_like"): "what dropout would allocate too",
    ("layer/piece_draws", "_plain", "clone"): "only where a tensor is not laid out as allocators do it",
    ("layer/boundaries", "_Arrival.__init__", "torch.empty"): "two buffers, made again only for a longer batch",
    ("layer/boundaries", "Boundaries._close_slabs", "synchronize"): "end of a life, or of a buffer that was too small",
    ("layer/layer_weights", "LayerWeights.weights_at_rest", "to"): "in a visit that is checked alone, on request",
    ("layer/layer_weights", "LayerWeights._promote", "to"): "once, when a base tensor is unfrozen",
    (
        "layer/layer_weights",
        "LayerWeights.bring_to_device",
        "to",
    ): "once, after an adapter was added",
}


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every outermost function with its qualified name; a function inside one counts as part of it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def method_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """(call, text of the object, name of the method) of every ``object.method(...)`` below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, ast.unparse(node.func.value), node.func.attr


def costly_calls(source: str) -> set[tuple[str, str]]:
    """(function, call) of every call that waits for a device, moves a tensor or allocates one."""
    found = set()
    for function, node in functions(ast.parse(source)):
        for _, owner, method in method_calls(node):
            if owner == "torch" and method in FACTORIES:
                found.add((function, f"torch.{method}"))
            elif method in METHODS:
                found.add((function, method))
    return found


def work_under_lock(source: str) -> set[str]:
    """Calls that wait for bytes or a device in the body of a ``with`` on a lock or condition, known by their names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            guards = [ast.unparse(item.context_expr) for item in node.items]
            if any(guard.endswith(("lock", "condition", "_changed")) for guard in guards):
                calls = [call for statement in node.body for call in method_calls(statement)]
                found |= {f"{owner}.{method}" for _, owner, method in calls if method in DEVICE_WORK}
    return found


def unbounded_waits(source: str) -> set[str]:
    """Calls of ``wait()`` with no bound on anything but a device event, which does not block the host."""
    calls = method_calls(ast.parse(source))
    return {
        owner
        for call, owner, method in calls
        if method in ("wait", "wait_for") and not call.args and not call.keywords and not owner.endswith("_event")
    }


def unnamed_threads(source: str) -> list[str]:
    """Threads and pools that are begun without a name that starts with the package's, spelt there or in a constant."""
    tree = ast.parse(source)
    constants = {
        ast.unparse(target): node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
    }

    def text_of(name: ast.expr) -> str:
        return str(
            name.value if isinstance(name, ast.Constant) else constants.get(ast.unparse(name).split(".")[-1], "")
        )

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Thread", "ThreadPoolExecutor"):
            names = [k.value for k in node.keywords if k.arg in ("name", "thread_name_prefix")]
            if not any(text_of(name).startswith("hf_lema") for name in names):
                found.append(ast.unparse(node))
    return found


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def test_hot_path_neither_waits_nor_moves_nor_allocates_but_where_the_table_says_why() -> None:
    found = {(module, *call) for module in HOT_MODULES for call in costly_calls(source_of(module))}

    assert found - set(ALLOWED) == set(), "not in the table"
    assert set(ALLOWED) - found == set(), "in the table, but no longer in the code"


@pytest.mark.parametrize("module", HOT_MODULES)
def test_no_lock_is_held_while_bytes_move(module: str) -> None:
    assert work_under_lock(source_of(module)) == set()


@pytest.mark.parametrize("module", HOT_MODULES)
def test_every_wait_of_a_thread_has_a_bound(module: str) -> None:
    assert unbounded_waits(source_of(module)) == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_thread_is_named_after_the_package(path: Path) -> None:
    assert unnamed_threads(path.read_text(encoding="utf-8")) == []


def test_checks_find_what_they_look_for() -> None:
    source = """
class Pool:
    def visit(self, slot):
        def inner():
            slot.buffer.to("cuda").record_stream(self.stream)
        spare = torch.empty_like(slot.buffer)
        with self._lock:
            slot.buffer.copy_(self.host)
            self._changed.wait()
            slot.ready_event.wait()
        threading.Thread(target=inner)
        ThreadPoolExecutor(4, thread_name_prefix="hf_lema-reader")
        Thread(target=inner, name=self.THREAD_NAME)
        Thread(target=inner, name=self.OTHER_NAME)
THREAD_NAME = "hf_lema-sampler"
OTHER_NAME = "sampler"
"""
    assert costly_calls(source) == {
        ("Pool.visit", "to"),
        ("Pool.visit", "record_stream"),
        ("Pool.visit", "torch.empty_like"),
    }
    assert work_under_lock(source) == {"slot.buffer.copy_"}
    assert unbounded_waits(source) == {"self._changed"}
    assert unnamed_threads(source) == [
        "threading.Thread(target=inner)",
        "Thread(target=inner, name=self.OTHER_NAME)",
    ]
