"""The config of a checkpoint's model in transformers, which `AutoConfig` knows after `import radio`.

It has a module of its own: transformers loads its Auto configs in the middle of loading what models need.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class RadioVisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """The shape of a RadioModel in a config.json."""

    model_type = "am-radio"

    model: dict[str, Any] | None = None  # a `ModelConfig` as plain data
    metadata: dict[str, Any] | None = None  # the checkpoint's entries `resolution` and `teachers`


def register() -> None:
    """Register the class with `AutoConfig`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(RadioVisionConfig.model_type, RadioVisionConfig, exist_ok=True)
