"""Visual question answering: LLaVA-1.5 on any backbone, on GQA, VQAv2, TextVQA, ScienceQA and POPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, RunSettings, late
from radio.datasets import DataSets

from .settings import Task, TaskFiles, VqaSettings


@evaluators.register("vqa")
def make() -> Evaluator[VqaSettings]:
    """Visual question answering by a LLaVA-1.5 on the model: GQA, VQAv2, TextVQA, ScienceQA, POPE."""
    return Evaluator(
        name="vqa",
        settings=VqaSettings,
        evaluate=late("evals.vqa.evaluator:evaluate"),
        title="visual question answering",
        suffix=suffix,
        input_size=late("evals.vqa.settings:input_size"),
        expensive=True,  # it trains a language model
        with_seed=with_seed,
        score_predictions=late("evals.vqa.evaluator:score_predictions"),
        predictions_of=lambda settings: settings.predictions,
        data_sets=data_sets,
    )


def suffix(settings: VqaSettings) -> str:
    """Return what a single benchmark adds to the model's name: POPE, or one without files of its own."""
    alone = settings.task == "pope" or settings.files is None
    return f"-{settings.task}" if settings.task is not None and alone else ""


def data_sets(settings: VqaSettings, sets: DataSets) -> Mapping[str, VqaSettings]:
    """Train on LLaVA-1.5's data and score on every benchmark that is there, except where either is named.

    It is under `OWN` where the training data are named.
    """
    if settings.predictions is not None:
        return {OWN: settings}
    name = OWN
    if settings.instruct_data is None:
        if sets.llava is None:
            return {}
        name = "llava"
        settings = replace(
            settings,
            pretrain_data=sets.llava.pretrain_data,
            pretrain_images=sets.llava.pretrain_images,
            instruct_data=sets.llava.instruct_data,
            instruct_images=sets.llava.instruct_images,
        )
    if settings.language_model is None and sets.language_model is not None:
        settings = replace(settings, language_model=str(sets.language_model))
    if "score" in settings.stages and settings.files is None and not settings.benchmarks:
        there = benchmark_files(sets, ocr=settings.ocr).items()
        benchmarks = {task: files for task, files in there if settings.task in (None, task)}
        if not benchmarks:
            return {}
        settings = replace(settings, benchmarks=benchmarks)
    return {name: settings}


def benchmark_files(sets: DataSets, *, ocr: bool = False) -> dict[Task, TaskFiles]:
    """Return the files of each benchmark that is there; `ocr` puts OCR tokens into TextVQA's prompts."""
    files: dict[Task, TaskFiles] = {}
    if (gqa := sets.gqa) is not None:
        files["gqa"] = TaskFiles(questions=gqa.questions, images=gqa.images)
    if (vqa := sets.vqav2) is not None:
        files["vqav2"] = TaskFiles(questions=vqa.questions, annotations=vqa.answers, images=vqa.images)
    if (text := sets.textvqa) is not None:
        ocr_file = text.ocr if ocr else None
        files["textvqa"] = TaskFiles(questions=text.questions, images=text.images, ocr=ocr, ocr_file=ocr_file)
    if (sqa := sets.sqa) is not None:
        files["scienceqa"] = TaskFiles(questions=sqa.questions, splits=sqa.splits, images=sqa.images)
    if (pope := sets.pope) is not None:
        files["pope"] = TaskFiles(questions=pope.questions, images=pope.images)
    return files


def with_seed(settings: VqaSettings, run: RunSettings, number: int) -> VqaSettings:
    """Return the same protocol with other initial weights and another order of samples."""
    seed = run.seed if settings.training_seed is None else settings.training_seed
    return replace(settings, training_seed=seed + number)
