"""What a caller asks of ``from_pretrained``, and where the hub or a folder has it.

Responsibility: sorting the arguments, finding configuration, files and model class, an empty model on meta. Knows
nothing of what is in the files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from hf_lema.files.checkpoint import INDEX_NAME, SINGLE_NAME, read_weight_map
from hf_lema.model.conversion import transformers_at_least
from hf_lema.model.stock_quantizer import is_packed_config

AUTO_CLASS = "AutoModelForCausalLM"

_HUB_NAMES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_IGNORED_NAMES = ("low_cpu_mem_usage", "offload_state_dict", "output_loading_info", "weights_only", "_fast_init")
"""Arguments that change nothing here."""

_REFUSED = {
    "device_map": "hf_lema places the model: pass device and a budget",
    "max_memory": "hf_lema places the model: pass a budget",
    "offload_folder": "decoder layers are read from the checkpoint itself",
    "offload_buffers": "buffers are always on the device",
    "tp_plan": "tensor parallelism cannot be combined with streaming",
    "tp_size": "tensor parallelism cannot be combined with streaming",
    "device_mesh": "tensor parallelism cannot be combined with streaming",
    "distributed_config": "tensor parallelism cannot be combined with streaming",
    "quantization_config": 'pass LemaConfig(quantization="nf4")',
    "load_in_4bit": 'pass LemaConfig(quantization="nf4")',
    "load_in_8bit": 'layers of 8 bits cannot be streamed; pass LemaConfig(quantization="nf4") for 4',
    "gguf_file": "load it with transformers once, save it with save_pretrained, and load the saved folder",
    "state_dict": "weights are read from files",
    "variant": "rename the files of the variant to the plain names in a folder of their own",
    "use_kernels": "replaced kernels have not been tried under streaming",
    "kernel_config": "replaced kernels have not been tried under streaming",
    "adapter_kwargs": "load the base model, then PeftModel.from_pretrained(model, adapter)",
    "ignore_mismatched_sizes": "tensors of another shape would be filled with random numbers",
}


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """The arguments of ``from_pretrained``, sorted by who needs them.

    Attributes:
        name: Folder or hub id, as given.
        dtype: As given; None means the checkpoint's own.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        hub: Where on the hub: revision, token, cache and the like.
        config: A configuration object, a path or id of one, or None for the checkpoint's own.
        code_revision: Revision of the code, where it lies in another repository.
        attn_implementation: As given, or None.
        generation_config: As given, or None.
        key_mapping: As given, or None.
        others: Values of the configuration, or arguments of the model class.
    """

    name: str
    dtype: torch.dtype | str | None
    trust_remote_code: bool
    hub: Mapping[str, Any]
    config: Any = None
    code_revision: str | None = None
    attn_implementation: str | None = None
    generation_config: GenerationConfig | None = None
    key_mapping: Mapping[str, str] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)


def read_request(
    name: str, dtype: torch.dtype | str | None, trust_remote_code: bool, kwargs: Mapping[str, Any]
) -> ModelRequest:
    """Sort the arguments of ``from_pretrained``.

    Raises:
        ValueError: Arguments that cannot be combined with streaming; all are named with the reason.
    """
    refused = {key: why for key, why in _REFUSED.items() if kwargs.get(key)}
    if kwargs.get("use_safetensors") is False:
        refused["use_safetensors"] = "only safetensors files are read"
    if refused:
        listed = "".join(f"\n- {key}={kwargs[key]!r}: {why}" for key, why in refused.items())
        raise ValueError(f"from_pretrained cannot take these arguments for a streamed model:{listed}")
    rest = {
        key: value
        for key, value in kwargs.items()
        if key not in _REFUSED and key not in _IGNORED_NAMES and key != "use_safetensors"
    }
    torch_dtype = rest.pop("torch_dtype", None)  # the name before transformers 4.56
    return ModelRequest(
        name=name,
        dtype=dtype if dtype is not None else torch_dtype,
        trust_remote_code=trust_remote_code,
        hub={key: rest.pop(key) for key in _HUB_NAMES if key in rest},
        config=rest.pop("config", None),
        code_revision=rest.pop("code_revision", None),
        attn_implementation=rest.pop("attn_implementation", None),
        generation_config=rest.pop("generation_config", None),
        key_mapping=rest.pop("key_mapping", None),
        others=rest,
    )


def parse_dtype(wanted: torch.dtype | str) -> torch.dtype:
    """Turn what a caller calls a dtype into one that weights can have.

    Raises:
        ValueError: It is none.
    """
    dtype = vars(torch).get(wanted.removeprefix("torch.")) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype {wanted!r}: expected torch.float16, torch.bfloat16, torch.float32 or their names")
    return dtype


def load_config(request: ModelRequest) -> tuple[Any, dict[str, Any]]:
    """Load the configuration, with the caller's values in it.

    Returns:
        The configuration, which the caller may change, and the arguments that are no values of it: the model class's.

    Raises:
        ValueError: The checkpoint is quantized other than to bitsandbytes' 4 bits, an adapter, or its configuration
            names a weights file of its own.
        OSError: There is no such model.
    """
    adapter = find_adapter_config_file(request.name, **request.hub)
    if adapter is not None:
        raise ValueError(
            f"{request.name} holds a PEFT adapter ({Path(adapter).name}). Load its base model (from a folder without "
            "the adapter), then PeftModel.from_pretrained(model, adapter)"
        )
    if isinstance(request.config, PretrainedConfig):
        config, unused = copy.deepcopy(request.config), dict(request.others)
    else:
        config, unused = AutoConfig.from_pretrained(
            request.name if request.config is None else request.config,
            return_unused_kwargs=True,
            trust_remote_code=request.trust_remote_code,
            code_revision=request.code_revision,
            **request.hub,
            **request.others,
        )
    values = config.to_dict()
    stored = values.get("quantization_config")
    if stored is not None and not is_packed_config(stored):
        raise ValueError(
            f"{request.name} is already quantized ({stored.get('quant_method')}): of quantized layers only those of "
            "bitsandbytes with 4 bits can be streamed. Use the checkpoint that it was made from, with LemaConfig("
            'quantization="nf4") for 4 bits'
        )
    if values.get("transformers_weights") is not None:
        raise ValueError(
            f"the configuration of {request.name} names its weights file ({values['transformers_weights']!r}). Rename "
            f"it to {SINGLE_NAME} in a folder of its own, with the configuration without that entry"
        )
    config.name_or_path = request.name
    return config, {key: value for key, value in unused.items() if not key.startswith("_")}


def checkpoint_folder(request: ModelRequest) -> Path:
    """Find the folder with the checkpoint's files; from the hub, fetch those that are needed and no others.

    Raises:
        FileNotFoundError: The repository has no safetensors file that transformers would load.
        ValueError: The index of its shards is damaged.
        OSError: The repository cannot be found or reached.
    """
    folder = Path(request.name)
    if folder.is_dir():
        return folder / str(request.hub.get("subfolder", ""))
    single = cached_file(request.name, SINGLE_NAME, **request.hub, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return Path(single).parent
    index = cached_file(request.name, INDEX_NAME, **request.hub, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise FileNotFoundError(
            f"{request.name} has neither {SINGLE_NAME} nor {INDEX_NAME}, on the hub or in its local cache. If it has "
            f"only .bin files, convert it once where you trust its origin: hf-lema pack {request.name} FOLDER, and "
            "train from FOLDER"
        )
    hub = dict(request.hub)
    subfolder = hub.pop("subfolder", "")
    shards = sorted(set(read_weight_map(Path(index)).values()))
    # All shards of the commit that the index is of, even where the branch moves meanwhile.
    hub["revision"] = extract_commit_hash(index, None) or hub.get("revision")
    hub.pop("proxies", None)
    snapshot_download(request.name, allow_patterns=[f"{subfolder}/{name}".lstrip("/") for name in shards], **hub)
    return Path(index).parent


def model_on_meta(
    request: ModelRequest, config: Any, model_kwargs: Mapping[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model that ``from_pretrained`` would build: parameters on meta, buffers computed on the CPU.

    Draws nothing from the random generators, as ``from_pretrained`` draws nothing.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        sub_config = vars(config).get(name)
        if sub_config is not None:
            sub_config.dtype = dtype
    options: dict[str, Any] = {"dtype": dtype, **model_kwargs}
    if request.attn_implementation is not None:
        options["attn_implementation"] = request.attn_implementation
    auto_map = config.to_dict().get("auto_map") or {}
    remote_class: Any = None
    if request.trust_remote_code and AUTO_CLASS in auto_map:
        remote_class = get_class_from_dynamic_module(
            auto_map[AUTO_CLASS], request.name, code_revision=request.code_revision, **request.hub
        )
        remote_class.register_for_auto_class(AUTO_CLASS)
        remote_class = add_generation_mixin_to_remote_model(remote_class)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        if remote_class is not None:
            model = remote_class._from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    assert isinstance(model, PreTrainedModel)
    if transformers_at_least("5"):
        # Stock loading computes buffers that no file holds outside the dtype of the model: GPT-J's sine table differs.
        for module in model.modules():
            vars(module).pop("_is_hf_initialized", None)
        with torch.random.fork_rng(devices=[]):
            model.initialize_weights()
    return model
