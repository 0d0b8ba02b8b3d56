"""One training run: a dense model in, a compressed and distilled model out.

``run`` makes the dense model ready (calibrates and factorises it), starts a search from an
allocated plan, trains and distils the supernet, and cuts it to the plan that was found. Without
epochs it compresses at the plan where training would have started.
"""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from adacomcat import data
from adacomcat.convert.factors import require_finite_model
from adacomcat.convert.model import convert_
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.convert.record import compression_of
from adacomcat.cost import model_params
from adacomcat.customize.adapters import add_adapters, parameter_count
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.distill.metrics import Observer
from adacomcat.distill.start import (
    calibration_images,
    judging_images,
    make_ready,
    set_drop_path_,
    start_search,
)
from adacomcat.distill.state import has_state, load_state
from adacomcat.distill.trainer import Trainer
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search.published import freeze_attention_biases_
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import finalize
from adacomcat.utils.checksum import checksum
from adacomcat.utils.distributed import Processes, start_processes

__all__ = ["TrainResult", "calibration_images", "run"]


class TrainResult(NamedTuple):
    """The trained model, and what happened: plain numbers, lists and dicts."""

    model: nn.Module
    results: dict[str, Any]


def run(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any = None, *,
        teacher: nn.Module | None = None, plan: RankPlan | None = None,
        on_best: Callable[[nn.Module], None] | None = None,
        observer: Observer | None = None) -> TrainResult:
    """Compress and train a copy of ``model``; without keep_params and plan, train it as it is.

    Args:
        model: a dense model; one that is compressed already is only trained as it is.
        config: everything else that decides the run; with ``adapters`` the model's weights stay.
        train_set: labelled images, from ``data.train_and_test``. A part of them calibrates, and a
            part is held out for the search.
        test_set: labelled images that judge the result, and every epoch.
        teacher: what is distilled; the dense model where not given.
        plan: the ranks, in place of an allocation and a search.
        on_best: called with the finished model after each epoch that is the best so far on
            ``test_set``, in the first process.
        observer: gets the events of ``distill.metrics`` on the first process.

    Returns:
        The trained model in eval mode, and the results: parameters, history, searches, seconds,
        and with ``test_set`` the loss and top-1 accuracy in percent.

    Raises:
        UserError: settings contradict each other, the budget cannot be reached, the model has no
            site or is compressed already, a weight is not finite, the loss diverges, or the state
            to resume from belongs to another run or cannot be written.
        Lost: another process of the run died or stands still.
        Stopped: a signal asked the run to stop, inside ``utils.stopping.heeding_signals``; with
            a state_dir it can be resumed.
    """
    config = config.checked()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _require_agreement(config, plan)
    require_not_quantized(model, "train")
    require_finite_model(model)
    plan = None if plan is None else plan.resolved(model)
    processes = start_processes(config.device, config.timeout)
    config = _resuming_or_not(config, processes)
    model = copy.deepcopy(model).to(processes.device)
    train_set = train_set.augmented_by(config.picture_augmentation)
    start = time.perf_counter()
    began_with = _checksums(model, config, train_set, test_set, teacher, plan)
    if config.keep_params is None and plan is None:
        trainer = _dense_trainer(model, config, train_set, processes, teacher, began_with)
    elif config.total_epochs == 0:
        return _without_epochs(model, config, train_set, test_set, plan, processes)
    else:
        trainer = _search_trainer(model, config, train_set, test_set, processes, teacher, plan,
                                  began_with)
    trainer.observer = observer
    if config.resume:
        trainer.load_state_dict(load_state(str(config.state_dir)))
    elif trainer.search is not None:
        trainer.save()  # calibrating and factorising may have taken long
    trainer.train(test_set, on_best)
    trained = trainer.finished()
    seconds = time.perf_counter() - start
    return TrainResult(trained, _results(model, trained, trainer, test_set, seconds))


def _require_agreement(config: TrainConfig, plan: RankPlan | None) -> None:
    if plan is not None and config.refine:
        raise UserError("a plan fixes the ranks and leaves nothing to refine: give one of them")
    if plan is not None and config.adapters is not None:
        raise UserError("adapters train beside a model that stays as it is: give no plan")


def _dense_trainer(model: nn.Module, config: TrainConfig, train_set: Any, processes: Processes,
                   teacher: nn.Module | None, began_with: dict[str, str]) -> Trainer:
    student = set_drop_path_(copy.deepcopy(model), config.drop_path)
    student.requires_grad_(True)
    if config.adapters is not None:
        add_adapters(student, config.adapters, seed=config.seed)
    if config.drop_attention_biases and not config.finetune_attention_biases:
        freeze_attention_biases_(student)
    processes.broadcast_(student)
    return Trainer(student, config, train_set, processes, teacher=_frozen(teacher, processes),
                   inputs=began_with)


def _checksums(model: nn.Module, config: TrainConfig, train_set: data.LabelledImages,
               test_set: data.LabelledImages | None, teacher: nn.Module | None,
               plan: RankPlan | None) -> dict[str, str]:
    """What decides the run beside its settings, by checksums; nothing where no state is kept."""
    if config.state_dir is None:
        return {}
    found = {"model": checksum(model.state_dict()), "training set": train_set.checksum(),
             "plan": checksum(None if plan is None else plan.ranks)}
    if config.has_teacher and teacher is not None:
        found["teacher"] = checksum(teacher.state_dict())
    if config.search_images == "validation" and test_set is not None:
        found["validation set"] = test_set.checksum()
    return found


def _search_trainer(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any,
                    processes: Processes, teacher: nn.Module | None, plan: RankPlan | None,
                    began_with: dict[str, str]) -> Trainer:
    if config.has_teacher:
        teacher = _frozen(model if teacher is None else teacher, processes)
    searching = config.search != "off" and plan is None
    train_part, search_part = train_set, None
    if searching and config.search_images == "validation":
        search_part = _validation_images(test_set)
    elif searching:
        train_part, search_part = data.split_holdout(train_set, config.search_fraction, config.seed)
    judges = judging_images(train_set, config)
    ready = make_ready(model, config, train_set, plan, processes)
    search = start_search(ready, config, plan, processes, judges)
    set_drop_path_(search.supernet, config.drop_path)
    return Trainer(search.supernet, config, train_part, processes,
                   teacher=teacher if config.has_teacher else None, search=search,
                   search_part=search_part, inputs=began_with)


def _validation_images(test_set: Any) -> Any:
    if test_set is None:
        raise UserError("the search is to see validation images, and there are none: give them, "
                        "or take search_images 'held-out'")
    warnings.warn("ranks are searched on the images that judge the result, which flatters it; "
                  "--search-images held-out takes training images", stacklevel=2)
    return test_set


def _frozen(teacher: nn.Module | None, processes: Processes) -> nn.Module | None:
    if teacher is None:
        return None
    teacher = copy.deepcopy(teacher).to(processes.device)
    return teacher.requires_grad_(False).eval()


def _without_epochs(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any,
                    plan: RankPlan | None, processes: Processes) -> TrainResult:
    """Compression at the plan that training would start from, with the factors that gave it.

    Without images the supernet is cut, whose factors have the model's dtype: this differs by
    rounding from factors that are cut in float64.
    """
    start = time.perf_counter()
    judges = judging_images(train_set, config)
    ready = make_ready(model, config, train_set, plan, processes)
    search = start_search(ready, config, plan, processes, judges)
    if ready.batches is None:
        trained = finalize(search.supernet, search.plan)
    else:
        trained = convert_(copy.deepcopy(ready.model), search.plan, ready.factors, ready.batches)
    results = _summary(model, trained, test_set, config, processes)
    results |= _refinement(search)
    results["seconds"] = time.perf_counter() - start
    return TrainResult(trained.eval(), results)


def _resuming_or_not(config: TrainConfig, processes: Processes) -> TrainConfig:
    """``config.resume`` says whether there is a state to go on from: a plan and all weights."""
    if config.resume and config.state_dir is None:
        raise UserError("resume needs the folder of a training state")
    found = bool(config.resume and config.total_epochs and has_state(str(config.state_dir)))
    if not processes.agree(found):
        raise UserError(f"some processes find a training state in {config.state_dir} and others do "
                        "not: name a --state-dir that all machines share")
    return config.with_(resume=found)


def _summary(dense: nn.Module, trained: nn.Module, test_set: Any, config: TrainConfig,
             processes: Processes) -> dict[str, Any]:
    results: dict[str, Any] = {"params": model_params(trained), "dense_params": model_params(dense),
                               "history": [], "searches": [], "search_seconds": 0.0}
    results["keep"] = results["params"] / results["dense_params"]
    plan = compression_of(trained).plan
    if plan is not None:
        results["plan"] = dict(plan.ranks)
    if test_set is not None:
        size = 4 * config.batch_size
        results |= evaluate(trained, test_set, size, processes, config.workers)
        if results["keep"] != 1:
            results["dense_top1"] = evaluate(dense, test_set, size, processes,
                                             config.workers)["top1"]
    return results


def _results(dense: nn.Module, trained: nn.Module, trainer: Trainer, test_set: Any,
             seconds: float) -> dict[str, Any]:
    results = _summary(dense, trained, test_set, trainer.config, trainer.processes)
    results |= {"history": trainer.history, "searches": trainer.searches, "seconds": seconds}
    if trainer.config.adapters is not None:
        results["adapters"] = parameter_count(trained)
    if trainer.best:
        results["best"] = trainer.best
    if trainer.search is not None:
        results |= {"search_count": trainer.search.count,
                    "search_seconds": trainer.search.seconds} | _refinement(trainer.search)
    return results


def _refinement(search: RankSearch) -> dict[str, Any]:
    return {} if search.refinement is None else {"refinement": search.refinement}
