"""transformers' hooks for compressed models: a method of its own among those that quantise.

``from_pretrained`` asks the method that config.json names to replace modules before weights are
loaded, and ``save_pretrained`` asks it before the configuration is written. ``adacomcat/__init__``
calls ``register`` as soon as transformers knows its methods.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "adacomcat"


class AdacomcatConfig(QuantizationConfigMixin):
    """What config.json tells of a compression.

    Args:
        plan: Site → rank, of the low-rank modules.
        plain: Whether they have the form of ``adacomcat.to_plain``.
    """

    def __init__(self, plan: Mapping[str, Any] | None = None, plain: bool = False,
                 quant_method: str = METHOD, **others: Any) -> None:
        self.quant_method: Any = quant_method
        self.plan, self.plain = dict(plan or {}), plain


class AdacomcatQuantizer(HfQuantizer):
    """Puts low-rank modules into a model whose weights are not loaded yet."""

    quantization_config: AdacomcatConfig

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        from adacomcat.convert.install import build_skeleton
        from adacomcat.convert.plain import to_plain_
        from adacomcat.plan import RankPlan

        config = self.quantization_config
        before = set(model.modules())
        build_skeleton(model, RankPlan(fitting(config.plan, model)))
        _tell_made(model, before)
        if config.plain:
            to_plain_(model)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model.config.quantization_config = self.quantization_config
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Tells the configuration what is low-rank now: a head may have been replaced since.

        Parameters are written under their own names. Those that transformers would give them, as on
        its hub, join the weights of several layers in one.
        """
        from adacomcat.convert.plain import is_plain_form, require_not_optimized
        from adacomcat.convert.record import ranks_as_they_are

        require_not_optimized(model, "save_pretrained")
        if ranks := ranks_as_they_are(model):
            model.config.quantization_config = AdacomcatConfig(ranks, is_plain_form(model))
        elif isinstance(getattr(model.config, "quantization_config", None), AdacomcatConfig):
            del model.config.quantization_config
        model._weight_conversions = []
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _tell_made(model: Any, before: set[Any]) -> None:
    """Keep transformers from drawing random weights for modules that are new, and for those that
    hold them: it would look for the layers of the dense class."""
    for module in model.modules():
        children = set(module.children())
        if module not in before or (children - before and not hasattr(module, "from_pretrained")):
            module._is_hf_initialized = True


def keep_plan(model: Any, ranks: Mapping[str, Any]) -> None:
    """Let ``save_pretrained`` write what is low-rank in ``model``, also where another model holds
    it, and refuse what is fused; ``ranks``: by the names of ``model``."""
    from adacomcat.plan import RankPlan

    model.hf_quantizer = AdacomcatQuantizer(AdacomcatConfig())
    if ranks:
        model.rank_plan = RankPlan(dict(ranks))


def fitting(plan: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """``plan`` by the names of ``model``, which may be the backbone of the model that was saved, or
    hold it; what it lacks, such as a head, is left out."""
    from adacomcat.sites import find_sites, prunable_mlps

    known = {site.name for pruned in ((), prunable_mlps(model))
             for site in find_sites(model, pruned)}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, rank in plan.items():
        names = (name, name.removeprefix(prefix), prefix + name)
        fits = next((one for one in names if one in known), None)
        if fits is not None:
            found[fits] = rank
    return found


def register(auto: ModuleType) -> None:
    """Make the method known to transformers; ``auto`` is ``transformers.quantizers.auto``."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(AdacomcatConfig)
        auto.register_quantizer(METHOD)(AdacomcatQuantizer)
