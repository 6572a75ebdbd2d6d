"""A checkpoint's model as a class of transformers, which `AutoModel` knows after `import radio`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ..config import from_plain
from ..errors import ConfigError
from ..model import ModelConfig, build
from .hf_config import RadioVisionConfig

# Letters: B batch, C summary width, T tokens, D token width, H W grid.


@dataclass
class RadioVisionOutput(ModelOutput):  # type: ignore[misc]
    """The outputs of a `RadioVisionModel`."""

    summary: Tensor | None = None  # [B, C]
    last_hidden_state: Tensor | None = None  # [B, T, D]: the tokens, row-major over the grid, no class tokens
    grid: tuple[int, int] | None = None  # (H, W), H * W == T
    adaptors: dict[str, tuple[Tensor, Tensor]] | None = (
        None  # by teacher: its summary [B, C], tokens [B, T, D]
    )


class RadioVisionModel(PreTrainedModel):  # type: ignore[misc]
    """A student and its adaptors behind transformers' interface.

    `pixel_values` are RGB in [0, 1], as the folder's image processor makes them: it resizes, crops and
    divides by 255, and the model normalises by itself. Pixels that were normalised before give wrong
    features.

    Raises:
        ConfigError: the config describes no model.
    """

    config_class = RadioVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: RadioVisionConfig) -> None:
        super().__init__(config)
        if config.model is None:
            raise ConfigError('the config has no entry "model"; open a folder that radio-export wrote')
        shape = from_plain(ModelConfig, config.model, "config.json: model")
        with torch.device("cpu"):  # transformers builds on the meta device, which would lose the constants
            self.model = build(shape, 0, config.metadata)
        self._constants = _constants(self.model)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Restore the buffers that no file holds (mean and std): transformers leaves them uninitialised."""
        for name, value in self._constants.get(module, {}).items():
            module.get_buffer(name).copy_(value)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None
    ) -> RadioVisionOutput | tuple[Any, ...]:
        """Compute the features of [B, 3, h, w] RGB in [0, 1], and those in the teachers' spaces.

        Raises:
            SizeError: a size that the student does not accept; names the nearest that it does.
        """
        features = self.model(pixel_values)
        adapted = {name: adaptor(features) for name, adaptor in self.model.adaptors.items()}
        output = RadioVisionOutput(
            summary=features.summary,
            last_hidden_state=features.tokens,
            grid=features.grid,
            adaptors={name: (of.summary, of.tokens) for name, of in adapted.items()},
        )
        return output.to_tuple() if return_dict is False else output


def _constants(model: nn.Module) -> Mapping[nn.Module, dict[str, Tensor]]:
    """Copy the buffers that are not saved, by their modules."""
    copies: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if buffer is not None:
                copies[module][name] = buffer.clone()
    return copies


def register() -> None:
    """Register the class with `AutoModel`."""
    from transformers.models.auto.modeling_auto import AutoModel

    AutoModel.register(RadioVisionConfig, RadioVisionModel, exist_ok=True)
