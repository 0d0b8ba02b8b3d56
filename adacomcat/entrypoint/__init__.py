"""timm's entry point for compressed models: it rebuilds one from a checkpoint folder's config.json.

``adacomcat/__init__`` calls ``register`` as soon as timm is imported. Importing this module loads
no other module of this package; the functions import what they need.
"""

import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from adacomcat.utils.names import ENTRYPOINT


def register(timm: ModuleType) -> None:
    """Make ``adacomcat_vit`` known to timm."""
    if not timm.is_model(ENTRYPOINT):
        timm.models.register_model(adacomcat_vit)


def adacomcat_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """The architecture ``base`` of timm with the low-rank modules of ``plan``, or quantised layers.

    Args:
        pretrained: load the weights of the checkpoint folder.
        kwargs: the ``model_args`` of config.json: ``base``, ``plan`` (site name → rank),
            ``plain`` (whether ``to_plain`` follows), ``int8`` and ``int4`` (names of
            layers with such weights) and the keyword arguments of ``base``.

    Raises:
        UserError: ``base`` is missing, as when the model is created by its name.
    """
    from timm.models import build_model_with_cfg

    from adacomcat.errors import UserError

    if "base" not in kwargs:
        raise UserError(f"{ENTRYPOINT} is the architecture of checkpoint folders: "
                        "timm.create_model('local-dir:DIR', pretrained=True)")
    kwargs["plan"] = _without_new_classifier(kwargs.get("plan") or {}, kwargs)
    features = _feature_cfg(kwargs) if kwargs.get("features_only") else None
    return build_model_with_cfg(
        _build, ENTRYPOINT, pretrained, pretrained_filter_fn=_adapt_weights,
        feature_cfg=features, **kwargs)


def _feature_cfg(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """How the base architecture takes features: its constructor says so to timm's builder only.

    It pops what the caller asks for (``out_indices``) from ``kwargs``.
    """
    from timm.models import model_entrypoint

    construct = model_entrypoint(kwargs["base"])
    module: Any = sys.modules[construct.__module__]
    told: dict[str, Any] = {}

    def listen(*args: Any, feature_cfg: dict[str, Any] | None = None, **others: Any) -> None:
        told.update(feature_cfg or {})

    builder = module.build_model_with_cfg
    module.build_model_with_cfg = listen
    try:
        construct(**{name: value for name, value in kwargs.items()
                     if name not in ("base", "plan", "plain", "int8", "int4")})
    finally:
        module.build_model_with_cfg = builder
    for name in told:
        kwargs.pop(name, None)
    return told or None


def _build(base: str, plan: dict[str, Any], plain: bool = False, int8: Sequence[str] = (),
           int4: Sequence[str] = (), **model_args: Any) -> Any:
    import timm

    from adacomcat.convert.install import build_skeleton
    from adacomcat.convert.plain import to_plain
    from adacomcat.convert.quantized import quantized_skeleton_
    from adacomcat.convert.record import record_
    from adacomcat.plan import RankPlan

    model: Any = build_skeleton(timm.create_model(base, **model_args), RankPlan(dict(plan)))
    runtime = ("device", "dtype")
    record_(model, source={
        "architecture": base,
        "model_args": {k: v for k, v in model_args.items() if k not in runtime}})
    model = to_plain(model) if plain else model
    for bits, names in ((8, int8), (4, int4)):
        model = quantized_skeleton_(model, names, bits) if names else model
    return model


def classifiers(pretrained_cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names of the modules that timm calls the classifier."""
    names = pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _without_new_classifier(plan: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The plan; without the classifier where another number of classes makes a new, dense one."""
    saved = kwargs.get("pretrained_cfg") or {}
    if kwargs.get("num_classes", saved.get("num_classes")) == saved.get("num_classes"):
        return plan
    return {name: rank for name, rank in plan.items() if name not in classifiers(saved)}


def _adapt_weights(weights: dict[str, Any], model: Any) -> dict[str, Any]:
    """The saved weights for ``model``, which may have other classes or another image size.

    A new classifier gets none. Another size is left to the filter of the base architecture's
    module, which resamples position embeddings.
    """
    from adacomcat.checkpoint.gauge import with_gauge

    weights = with_gauge(weights)
    wanted = model.state_dict()
    changed = {name.rpartition(".")[0] for name in weights.keys() - wanted.keys()}
    changed |= {name.rpartition(".")[0] for name, value in weights.items()
                if name in wanted and wanted[name].shape != value.shape}
    fresh = changed & set(classifiers(model.pretrained_cfg))
    weights = {name: value for name, value in weights.items()
               if name.rpartition(".")[0] not in fresh}
    base = sys.modules[type(model).__module__]
    adapt = getattr(base, "checkpoint_filter_fn", None)
    if changed == fresh or adapt is None:
        return weights
    takes_model = len(inspect.signature(adapt).parameters) > 1
    return adapt(weights, model) if takes_model else adapt(weights)
