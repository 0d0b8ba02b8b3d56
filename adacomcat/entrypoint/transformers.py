"""transformers' hooks for compressed models: a method of its own among those that quantise.

``from_pretrained`` asks the method that config.json names to replace modules before weights are
loaded, and ``save_pretrained`` asks it before the configuration is written. ``adacomcat/__init__``
calls ``register`` as soon as transformers knows its methods.
"""

from collections.abc import Mapping, Sequence
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
        int8: Names of the layers that ``adacomcat.quantize`` put on int8.
        int4: Those whose weights are on int4.
    """

    def __init__(self, plan: Mapping[str, Any] | None = None, plain: bool = False,
                 int8: Sequence[str] = (), int4: Sequence[str] = (),
                 quant_method: str = METHOD, **others: Any) -> None:
        self.quant_method: Any = quant_method
        self.plan, self.plain = dict(plan or {}), plain
        self.int8, self.int4 = list(int8), list(int4)

    @property
    def is_quantized(self) -> bool:
        return bool(self.int8 or self.int4)


class AdacomcatQuantizer(HfQuantizer):
    """Puts low-rank modules into a model whose weights are not loaded yet."""

    quantization_config: AdacomcatConfig

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        from adacomcat.convert.install import build_skeleton
        from adacomcat.convert.plain import to_plain_
        from adacomcat.convert.quantized import quantized_skeleton_
        from adacomcat.plan import RankPlan

        config = self.quantization_config
        before = set(model.modules())
        build_skeleton(model, RankPlan(fitting(config.plan, model)))
        if config.plain:
            to_plain_(model)
        layers = dict(model.named_modules())
        for bits, names in ((8, config.int8), (4, config.int4)):
            if fits := [name for each in names
                        for name in names_in(model, each) if name in layers]:
                quantized_skeleton_(model, fits, bits)
        _tell_made(model, before)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model.config.quantization_config = self.quantization_config
        return model.requires_grad_(False) if self.quantization_config.is_quantized else model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Tells the configuration what is low-rank now: a head may have been replaced since.

        Parameters are written under their own names. Those that transformers would give them, as on
        its hub, join the weights of several layers in one.
        """
        from adacomcat.convert.plain import is_plain_form, require_not_optimized
        from adacomcat.convert.quantized import quantized_layers
        from adacomcat.convert.record import ranks_as_they_are

        require_not_optimized(model, "save_pretrained")
        found = AdacomcatConfig(ranks_as_they_are(model), is_plain_form(model),
                                quantized_layers(model, 8), quantized_layers(model, 4))
        if found.plan or found.is_quantized:
            model.config.quantization_config = found
        elif isinstance(getattr(model.config, "quantization_config", None), AdacomcatConfig):
            del model.config.quantization_config
        model._weight_conversions = []
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return not self.quantization_config.is_quantized


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


def names_in(model: Any, name: str) -> tuple[str, str, str]:
    """What a module may be called in ``model``, which may be the backbone of the model that was
    saved, or hold it."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def fitting(plan: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """``plan`` by the names of ``model``; what it lacks, such as a head, is left out."""
    from adacomcat.sites import find_sites, prunable_mlps

    known = {site.name for pruned in ((), prunable_mlps(model))
             for site in find_sites(model, pruned)}
    found = {}
    for name, rank in plan.items():
        fits = next((one for one in names_in(model, name) if one in known), None)
        if fits is not None:
            found[fits] = rank
    return found


def register(auto: ModuleType) -> None:
    """Make the method known to transformers; ``auto`` is ``transformers.quantizers.auto``."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(AdacomcatConfig)
        auto.register_quantizer(METHOD)(AdacomcatQuantizer)
