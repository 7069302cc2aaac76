"""What every test stands on: no network, quiet and repeatable numerics, no thread left behind, a tiny real model."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch and transformers are imported, here and in every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only fight with the other test workers
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with two, Trainer would wrap every model in DataParallel
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmul, for the tests of equality on a GPU

import own_warnings
import pytest

own_warnings.install()  # before the libraries that could take `warnings.warn` by name

import torch  # noqa: E402

if TYPE_CHECKING:
    from test_host_store import FakeGpu
    from transformers import LlamaForCausalLM

THREAD_PREFIX = "hf_lema"
MAX_THREAD_END_S = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked gpu where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_device)


def leaked_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads begun since ``before`` that are the package's, or that would keep the process alive.

    A thread that is just ending gets a bounded time for it.
    """

    def suspects() -> list[threading.Thread]:
        begun = set(threading.enumerate()) - before
        return [thread for thread in begun if thread.name.startswith(THREAD_PREFIX) or not thread.daemon]

    if suspects():
        gc.collect()  # a model that the test dropped without close() is closed here, if its finalizer works
    for thread in suspects():
        thread.join(MAX_THREAD_END_S)
    return suspects()


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fails a test that leaves one of the package's threads, or any non-daemon thread, running."""
    before = set(threading.enumerate())
    yield
    leaked = leaked_threads(before)
    if leaked:
        names = ", ".join(sorted(f"{thread.name} (daemon={thread.daemon})" for thread in leaked))
        pytest.fail(f"threads left running: {names}; close the streamer, or wait for the thread, before the test ends")


@pytest.fixture(autouse=True)
def no_leaked_launcher_settings() -> Iterator[None]:
    """Puts back what ``TrainingArguments`` and ``Accelerator`` write into the environment for the processes they start.

    Without it, ``TrainingArguments(torch_compile=True)`` of one test compiles the models of the next ones.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def children_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts import this checkout, and take one core each."""
    root = Path(__file__).resolve().parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a random Llama of some hundred kilobytes; the same arguments give the same weights.

    ``tiny_llama(num_layers=4, dtype=torch.float32, seed=0, **config)``: ``config`` overrides fields of ``LlamaConfig``.
    The global random state is untouched. The model is in training mode, on the CPU.
    """

    def build(
        num_layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, **config: object
    ) -> LlamaForCausalLM:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape: dict[str, object] = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **(shape | config)))
        return model.to(dtype).train()

    return build


@pytest.fixture
def page_locks(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A CPU that is fed as a GPU is: through a ring of small windows, from memory whose page-locks are counted.

    Stores and boundary activations ask for page-locks as they do for a GPU; everything else is the CPU's.
    """
    from test_host_store import FakeGpu, LazyStream

    from hf_lema.layer import boundaries
    from hf_lema.runtime import host_memory, host_store
    from hf_lema.runtime.events import NullEvent

    fake, cuda = FakeGpu(LazyStream(), locked={}), torch.device("cuda")
    init, slab = host_store.HostStore.__init__, boundaries._Slab
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(host_memory, "clear_cuda_error", lambda: None)
    monkeypatch.setattr(host_store, "make_event", lambda device: NullEvent())
    monkeypatch.setattr(host_store, "run_near_card", lambda device: None)
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 4096)
    monkeypatch.setattr(host_store.HostStore, "__init__", lambda self, layouts, device: init(self, layouts, cuda))
    monkeypatch.setattr(boundaries, "_Slab", lambda num, nbytes, device: slab(num, nbytes, cuda))
    return fake
