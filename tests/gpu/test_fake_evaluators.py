"""Each evaluator's networks behind a model run on the device that they were moved to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radio.dist import Ranks
from radio.model import AdaptorConfig, ModelConfig, RadioModel

from .fake import GPU, on_gpu, pretend


def small_model(**adaptor: Any) -> RadioModel:
    """A student of 96 px on the GPU, with one adaptor if its widths are given."""
    adaptors = (AdaptorConfig(name="sam", **adaptor),) if adaptor else ()
    return on_gpu(lambda: RadioModel(ModelConfig(student="vit-tiny12", adaptors=adaptors))).eval()


def test_sams_neck_and_decoder() -> None:
    pytest.importorskip("segment_anything")
    from evals.sam_dropin.encoder import DropIn
    from evals.sam_dropin.masks import Prompts, boundaries, fill, make_frame, overlap, pack, predict_masks
    from radio.teachers.sam import SamHead, new_released_sam

    width = 48
    sam = new_released_sam(width)
    with pretend():
        head = on_gpu(lambda: SamHead(sam, "sam").to("meta"))
        drop_in = DropIn(small_model(summary_dim=5, token_dim=width), head, 96, "sam")
        embeddings = drop_in.embed(torch.rand(2, 3, 96, 96, device=GPU))
        boxes = torch.rand(3, 4, device=GPU)
        which = torch.zeros(3, dtype=torch.long, device=GPU)
        predictions = predict_masks(head, embeddings, which, Prompts(boxes=boxes), 2)
        assert embeddings.device == predictions.logits.device == predictions.quality.device == GPU
        size = (60, 80)
        masks = make_frame(*size, head.side).masks(predictions.logits) > head.threshold
        found = overlap(boundaries(pack(masks), size), fill(boxes.double(), size))
        assert found.device == GPU and found.shape == (3,)


@pytest.mark.slow
def test_the_probes_head(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmseg")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from evals.seg_probe.evaluator import load_plugin

    plugin = load_plugin()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # nobody asks the GPU what it can
    with pretend():
        backbone = plugin.RadioBackbone(small_model(), torch.float32)
        head = on_gpu(lambda: plugin.LinearHead(128, 5, Ranks())).train()
        logits = head(backbone(torch.rand(2, 3, 96, 96, device=GPU)))
        samples = []
        for _ in range(2):
            sample = SegDataSample()
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, 96, 96, dtype=torch.long, device=GPU))
            samples.append(sample)
        loss = head.loss_by_feat(logits, samples)["loss_ce"]
        assert logits.device == loss.device == GPU
        assert head.eval()(backbone(torch.rand(2, 3, 96, 96, device=GPU))).device == GPU


@pytest.mark.slow
def test_llava() -> None:
    pytest.importorskip("transformers")
    from evals.vqa.language import TinyShape, load_library, make_tiny

    load_library()
    from evals.vqa.llava import make_llava

    tiny = make_tiny(["what colour is it red"], TinyShape(width=32, heads=2, feed_forward=64), 0)
    backbone = RadioModel(ModelConfig(student="vit-tiny12")).eval()
    llava = make_llava(backbone, tiny, (96, 96), 64, layer_norm=True, seed=0)
    ids = torch.tensor([[1, *[tiny.image_token] * 64, 5, 6]])
    with pretend():
        llava.to(GPU)
        model = small_model()
        model.to = lambda *_: model  # type: ignore[method-assign, assignment]  # where it is already
        llava.model.vision_tower.attach(model)
        llava.model.vision_tower.train()  # where it does not look for NaN, which waits for the device
        tower = llava.model.vision_tower(torch.rand(1, 3, 96, 96, device=GPU)).last_hidden_state
        seen = llava.model.multi_modal_projector(tower)
        words = llava.get_input_embeddings()(ids.to(GPU))
        joined = torch.cat((words[:, :1], seen, words[:, 65:]), dim=1)
        found = llava.lm_head(llava.model.language_model(inputs_embeds=joined).last_hidden_state)
        assert tower.device == seen.device == found.device == GPU


def test_a_text_towers_vectors_join_on_its_device() -> None:
    pytest.importorskip("open_clip")
    from radio.teachers.base import ClipText

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            """[N, L] -> [N, 4]."""
            vectors: Tensor = self.table(ids).mean(1)
            return vectors

    def tokenizer() -> Any:
        return lambda texts: torch.ones(len(texts), 3, dtype=torch.long)

    with pretend():
        tower = on_gpu(lambda: ClipText(Words(), tokenizer, "ones"))
        assert tower.encode(["one"] * 600).device == GPU


def test_summaries_of_batches_with_images_that_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes to the GPU but the loader's page-locked images, which the host does not wait for."""
    from evals.core import features
    from evals.core.features import ViewSettings, make_view

    moved, sent = Tensor.to, []

    def to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if tensor.device.type == "cpu" and GPU in arguments:
            assert named.get("non_blocking"), "a copy that the host waits for"
            sent.append(tensor)
        return moved(tensor, *arguments, **named)

    with pretend():
        model = small_model()
        how = features.Extraction(view=make_view(model, ViewSettings())[0], device=GPU)
        sizes = [(96, 96), (48, 96), None, (96, 96)]
        items = [
            features._Item(place, None if size is None else torch.rand(3, *size), "" if size else "damaged")
            for place, size in enumerate(sizes)
        ]
        batch = features._collate(items)
        monkeypatch.setattr(Tensor, "to", to)
        found = features._encode(model, batch, how)
        assert len(sent) == 1 and sent[0] is batch.pixels
        assert found.device == GPU and found.shape == (3, model.summary_dim)
