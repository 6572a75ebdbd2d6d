"""Compare the speed of our evaluators with the libraries and methods that others score by, on equal inputs.

Each pair gives equal values, which is checked, and runs alternately in this process; a ratio is the median
CPU time of the peer over ours. DINOv2's k-NN and LLaVA's scorers are written here, from their descriptions.

    python benchmarks/peers.py [--peers knn vqa coco iou metrics seg clip extract] [--rounds 5]
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import tyro
from pycocotools import mask as masks_library
from pycocotools.coco import COCO
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from evals.core.classification import top_accuracies
from evals.core.features import place
from evals.core.stats import areas
from evals.knn.index import knn, load_faiss
from evals.sam_dropin.annotations import read_instances
from evals.sam_dropin.data import run_lengths
from evals.sam_dropin.masks import overlap, pack
from evals.seg_probe.data import Labelling, Pair, Split
from evals.seg_probe.evaluator import load_plugin
from evals.seg_probe.protocol import SegSettings, resolve
from evals.vqa.scoring import CONTRACTIONS, score_exact, score_letter, vqa_accuracy
from evals.zeroshot.evaluator import rank_classes
from evals.zeroshot.texts import class_vectors
from radio.benchmark import alternate
from radio.config import Count, check
from radio.dist import Ranks
from radio.entry import keep_freed_memory
from radio.hub import load_backbone
from radio.scenes.export import ScenesSettings, write_cached
from radio.teachers.openclip import OPENAI_MEAN, OPENAI_STD
from radio.types import Backbone

Job = Callable[[], Any]
Compared = tuple[str, Job, Job, float]
"""What is compared, the peer's way, ours, and by how much their values may differ."""
Peer = Literal["knn", "vqa", "coco", "iou", "metrics", "seg", "clip", "extract"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is compared."""

    peers: tuple[Peer, ...] = ("knn", "vqa", "coco", "iou", "metrics", "seg", "clip", "extract")
    rounds: Count = 5
    threads: Count = 1


def by_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, ks: tuple[int, ...], classes: int
) -> list[Tensor]:
    """Predict classes by one-hot votes of the nearest, weighted by a softmax over all of them, for each k."""
    predicted = []
    for block in queries.split(256):
        similarities, indices = (block @ bank.T).topk(max(ks), dim=1)
        votes = F.one_hot(labels[indices], classes) * F.softmax(similarities / 0.07, dim=1).unsqueeze(2)
        predicted.append(torch.stack([votes[:, :k].sum(1).argmax(1) for k in ks]))
    return list(torch.cat(predicted, dim=1))


def compare_knn(folder: Path) -> Iterator[Compared]:
    """Compare k-NN of features around the centres of their classes."""
    generator, ks, classes = torch.Generator().manual_seed(0), (10, 20, 100, 200), 1000
    centres = torch.randn(classes, 768, generator=generator)
    labels = torch.arange(11_000) % classes
    features = F.normalize(centres[labels] + 6 * torch.randn(len(labels), 768, generator=generator))
    bank, queries = features[:10_000], features[10_000:]

    def ours() -> list[float]:
        return list(knn(bank, labels[:10_000], queries, labels[10_000:], k=ks).accuracies.values())

    def theirs() -> list[float]:
        found = by_votes(bank, labels[:10_000], queries, ks, classes)
        return [100 * float((predicted == labels[10_000:]).double().mean()) for predicted in found]

    yield (
        "k-NN, bank of 10,000 x 768, 1,000 queries, k 10 to 200: DINOv2's one-hot votes / ours",
        theirs,
        ours,
        1e-9,
    )


_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")
_DIGITS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)


def eval_ai(answer: str) -> str:
    """Normalise an answer as TextVQA's evaluation does."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in sorted(set(_MARKS.findall(text))):
        goes = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text) is not None
        plain = plain.replace(mark, "" if goes else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(answer: str, truths: list[str]) -> float:
    """Score an answer by TextVQA's rule: over each of ten people left out, the share of three who agree."""
    expected = [eval_ai(truth) for truth in truths]
    scores = {}
    for unique in set(expected):
        left_out = [expected[:index] + expected[index + 1 :] for index in range(len(expected))]
        scores[unique] = sum(min(1, others.count(unique) / 3) for others in left_out) / len(left_out)
    return scores.get(eval_ai(answer), 0.0)


def exact(answer: str, truth: str) -> float:
    """Score an answer by GQA's rule, as LLaVA prepares it; GQA's evaluation sums 1.0 and 0.0."""
    return float(answer.rstrip(".").lower() == truth)


def chosen_letter(answer: str) -> str:
    """Find the letter of ScienceQA's answer: the text, its first before ". ", or after a set phrase."""
    if answer in "ABCDE" and len(answer) == 1:
        return answer
    if answer[:1] in tuple("ABCDE") and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else "FAILED"


def compare_vqa(folder: Path) -> Iterator[Compared]:
    """Compare LLaVA's scorers of GQA, TextVQA and ScienceQA."""
    source = np.random.default_rng(0)
    words = [
        f"{a} {b}{c}"
        for a in ("the", "2", "two", "red", "dont")
        for b in ("dog", "Cat", "bus")
        for c in ("", ".", "'s")
    ]
    words += [f"sign {number}" for number in range(3000)]
    picks = source.integers(0, len(words), 5000)
    truths = [
        [words[(pick + int(step)) % len(words)] for step in source.integers(0, 3, 10)] for pick in picks
    ]
    answers = [words[pick] for pick in picks]
    letters = [("A", "B. cat", "The answer is C.", "no")[pick % 4] for pick in picks]

    def text_theirs() -> float:
        return sum(soft_accuracy(answer, people) for answer, people in zip(answers, truths, strict=True))

    def text_ours() -> float:
        return sum(
            vqa_accuracy(answer, people, "m4c") for answer, people in zip(answers, truths, strict=True)
        )

    def exact_theirs() -> float:
        return sum(exact(a, t[0]) for a, t in zip(answers, truths, strict=True))

    def exact_ours() -> float:
        return sum(score_exact(a, t[0]) for a, t in zip(answers, truths, strict=True))

    yield (
        "TextVQA's accuracy of 5,000 answers, EvalAI's rule: as described / ours",
        text_theirs,
        text_ours,
        1e-9,
    )
    yield "GQA's exact match of 5,000 answers: as described / ours", exact_theirs, exact_ours, 0
    yield (
        "ScienceQA's letters of 5,000 answers: as described / ours",
        lambda: sum(chosen_letter(letter) == "A" for letter in letters),
        lambda: sum(score_letter(letter, "A") for letter in letters),
        0,
    )


def compare_coco(folder: Path) -> Iterator[Compared]:
    """Compare reading a COCO file, and its polygons as run lengths; ours is checked against a schema."""
    source, file = np.random.default_rng(0), folder / "instances.json"
    angles = np.linspace(0, 6.2, 30)
    annotations = []
    for id in range(5000):
        x, y, r = source.uniform(60, 420), source.uniform(60, 420), source.uniform(10, 50)
        polygon = (
            np.stack([x + r * np.cos(angles), y + r * np.sin(angles)], axis=1).round(2).flatten().tolist()
        )
        row = {"id": id + 1, "image_id": id // 7, "category_id": 1, "iscrowd": 0, "area": 3 * r * r}
        annotations.append({**row, "bbox": [x - r, y - r, 2 * r, 2 * r], "segmentation": [polygon]})
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 480, "width": 480} for n in range(715)]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    file.write_text(json.dumps(data))

    def ours() -> float:
        instances = [(each, image.size) for image in read_instances(file).images for each in image.instances]
        return float(sum(masks_library.area(run_lengths(each, size)) for each, size in instances))

    def theirs() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        return float(sum(masks_library.area(coco.annToRLE(each)) for each in coco.loadAnns(coco.getAnnIds())))

    yield (
        "5,000 COCO annotations read, as run lengths: pycocotools / ours, which checks them",
        theirs,
        ours,
        0,
    )


def compare_iou(folder: Path) -> Iterator[Compared]:
    """Compare the mask IoU of predicted masks with the ground truth's."""
    plane = F.interpolate(
        torch.randn(2, 64, 12, 16, generator=torch.Generator().manual_seed(0)), (480, 640), mode="bilinear"
    )
    predicted, truth = (plane > 0).unbind()

    def theirs() -> list[float]:
        encoded = [
            masks_library.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8)))
            for masks in (predicted, truth)
        ]
        return [masks_library.iou([one], [other], [0])[0, 0] for one, other in zip(*encoded, strict=True)]

    yield (
        "IoU of 64 pairs of masks, 480 x 640: pycocotools / ours",
        theirs,
        lambda: overlap(pack(predicted), pack(truth)).tolist(),
        1e-12,
    )


def compare_metrics(folder: Path) -> Iterator[Compared]:
    """Compare top-1 and mIoU with torchmetrics'."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (50_000,), generator=generator)
    ranking = torch.randint(1000, (50_000, 5), generator=generator)
    ranking[::2, 0] = labels[::2]
    accuracy = MulticlassAccuracy(1000, average="micro")
    yield (
        "top-1 of 50,000 predictions, 1,000 classes: torchmetrics / ours, with top-5 and intervals",
        lambda: 100 * float(accuracy(ranking[:, 0], labels)),
        lambda: top_accuracies(ranking, labels, 1000)["top1"].value,
        1e-4,
    )
    truth = torch.randint(150, (8, 512, 512), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, 149 - truth)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    jaccard = MulticlassJaccardIndex(150, average="macro", ignore_index=255)
    yield (
        "mIoU of 8 label maps of 512 x 512, 150 classes: torchmetrics / ours",
        lambda: 100 * float(jaccard(guess, truth)),
        lambda: areas(guess, truth, num_classes=150).miou,
        1e-4,
    )


def compare_seg(folder: Path) -> Iterator[Compared]:
    """Compare testing a probe, by crops, with MMSegmentation's data set, transforms and metric."""
    load_plugin()
    from mmcv.transforms import LoadImageFromFile, Resize
    from mmengine.dataset import pseudo_collate
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
    from mmseg.evaluation import IoUMetric

    from evals.seg_probe.plugin import AreaMetric, Images, build_model

    write_cached(folder / "ade", ScenesSettings(layout="ade20k", count=1, val_count=16), lambda reason: None)
    images, labels = (folder / "ade" / kind / "validation" for kind in ("images", "annotations"))
    pairs = tuple(Pair(p.stem, p, labels / f"{p.stem}.png") for p in sorted(images.iterdir()))
    classes = tuple(f"class {n}" for n in range(11))
    backbone = load_backbone("scenes:dense")
    config, _ = resolve(SegSettings(preset="dinov2", crop=96, stride=48, data=folder), backbone)
    torch.manual_seed(0)
    model: Any = build_model(backbone, torch.float32, config, 11, Ranks(), cached=False).eval()
    samples = Images(
        Split(name="val", location="", pairs=pairs),
        Labelling(classes=classes, zero_is_void=True),
        config,
        backbone,
        training=False,
    )
    scale = (config.long_side, config.short_side)
    suffix = pairs[0].image.suffix
    peers = BaseSegDataset(
        data_prefix={"img_path": str(images), "seg_map_path": str(labels)},
        img_suffix=suffix,
        metainfo={"classes": classes},
        reduce_zero_label=True,
        pipeline=[
            LoadImageFromFile(),
            Resize(scale=scale, keep_ratio=True),
            LoadAnnotations(),
            PackSegInputs(),
        ],
    )

    def test(data: Any, metric: Any) -> float:
        metric.dataset_meta = {"classes": classes}
        with torch.no_grad():
            for index in range(len(data)):
                batch = pseudo_collate([data[index]])
                metric.process(batch, [sample.to_dict() for sample in model.test_step(batch)])
        return float(metric.evaluate(len(data))["mIoU"])

    yield (
        "testing a probe on 16 images, slide mode: MMSegmentation's data set and metric / ours",
        lambda: test(peers, IoUMetric(ignore_index=255, iou_metrics=["mIoU"])),
        lambda: test(samples, AreaMetric(Ranks())),
        0.011,
    )


def compare_clip(folder: Path) -> Iterator[Compared]:
    """Compare a zero-shot classifier from a text tower as wide as ViT-B/32's, and the logits."""
    name = "radio-benchmark"
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 56, "layers": 1, "width": 128, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 3},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    teacher = place(
        load_backbone(f"openclip:{name}@{folder / 'weights.pt'}"), torch.device("cpu"), torch.float32
    )
    tower = teacher.text
    assert tower is not None, "open_clip's models have one"
    tokenizer = open_clip.get_tokenizer(name)
    classes = [f"thing number {n}" for n in range(20)]
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
    texts = [template("{}") for template in templates]
    images = F.normalize(torch.randn(10_000, 512))

    def theirs() -> Tensor:
        with torch.no_grad():
            vectors: Tensor = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
        return vectors

    columns = F.normalize(torch.randn(512, 1000), dim=0)
    pixels = torch.rand(256, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))

    def best_theirs() -> list[int]:
        with torch.inference_mode():
            features = model.encode_image((pixels - mean) / std, normalize=True)
            best: list[int] = (100.0 * features @ columns).topk(5)[1][:, 0].tolist()
        return best

    def best_ours() -> list[int]:
        with torch.inference_mode():
            return rank_classes(teacher(pixels).summary, columns).classes[:, 0].tolist()

    yield (
        "classifier of 20 classes, 7 templates: open_clip / ours",
        lambda: theirs().flatten().tolist(),
        lambda: class_vectors(tower, classes, texts).flatten().tolist(),
        1e-5,
    )
    yield "zero-shot of 256 images at 56 px, 1,000 classes: open_clip / ours", best_theirs, best_ours, 0
    yield (
        "the five best of 1,000 classes of 10,000 images: logits / ours, whose rounding changes no rank",
        lambda: [(100.0 * block @ columns).topk(5)[1][:, 0].tolist() for block in images.split(1000)],
        lambda: [block.tolist() for block in rank_classes(images, columns).classes[:, 0].split(1000)],
        0,
    )


def compare_extract(folder: Path) -> Iterator[Compared]:
    """Compare the features of a CNN and of a ViT with timm's own model, called as its `validate` does."""
    images = torch.rand(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in ("tf_efficientnet_lite0", "vit_small_patch16_224"):
        torch.manual_seed(0)
        network: Any = timm.create_model(name).eval()
        torch.save(network.state_dict(), folder / f"{name}.pt")
        model = place(load_backbone(f"timm:{name}@{folder / name}.pt"), torch.device("cpu"), torch.float32)
        mean, sd = (torch.tensor(network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

        def theirs(network: Any = network, mean: Tensor = mean, sd: Tensor = sd) -> list[float]:
            with torch.inference_mode():
                features = network.forward_features((images - mean) / sd)
                means: list[float] = network.forward_head(features, pre_logits=True).mean(1).tolist()
            return means

        def ours(model: Backbone = model) -> list[float]:
            with torch.inference_mode():
                return model(images).summary.mean(1).tolist()

        yield f"features of 64 images at 224 px by {name}: timm / ours", theirs, ours, 1e-4


PEERS: dict[Peer, Callable[[Path], Iterator[Compared]]] = {
    "knn": compare_knn,
    "vqa": compare_vqa,
    "coco": compare_coco,
    "iou": compare_iou,
    "metrics": compare_metrics,
    "seg": compare_seg,
    "clip": compare_clip,
    "extract": compare_extract,
}


def main(settings: Settings) -> int:
    """Print the ratios as rows of a table; return 1 where two values differ, else 0."""
    logging.disable(logging.WARNING)  # MMSegmentation's metric logs a table at each evaluation
    keep_freed_memory()  # as our commands do; for the peers as well
    torch.set_num_threads(settings.threads)
    load_faiss().omp_set_num_threads(settings.threads)
    equal = True
    for peer in settings.peers:
        with tempfile.TemporaryDirectory() as folder:
            for question, theirs, ours, tolerance in PEERS[peer](Path(folder)):
                gap = float(np.max(np.abs(np.subtract(theirs(), ours()))))
                equal = equal and gap <= tolerance
                seconds = alternate([theirs, ours], settings.rounds)
                wrong = "" if gap <= tolerance else f", and the values differ by {gap:.3g}"
                sys.stdout.write(
                    f"| {question}{wrong} | {seconds[0] / seconds[1]:.2f} | `python benchmarks/peers.py` |\n"
                )
                sys.stdout.flush()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(check(tyro.cli(Settings, description=__doc__))))
