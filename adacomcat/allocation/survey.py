"""What an allocation must know of a dense model: error curves of its sites, and what errors count.

A model whose blocks are known goes block by block: tokens of all images through one block, its
statistics, its factors, its probes; then the statistics are dropped, and the factors where nobody
keeps them. So this takes one dense pass, and the probes begin where the site lies.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.allocation.sensitivity import (
    PROBE_IMAGES,
    ErrorWeights,
    left_in_sequence,
    probe_module,
    probed_changes,
    relative_change,
    relative_sensitivities,
    weights_of_changes,
)
from adacomcat.convert.calibrate import (
    BATCH,
    Statistics,
    collected,
    require_taken,
    warn_of_thin,
    watched,
)
from adacomcat.convert.factors import ErrorCurve, Factors, SiteFactors, factorize_model
from adacomcat.convert.model import ALLOCATION_IMAGES, model_statistics
from adacomcat.convert.sequential import sequential_blocks, sequential_encoder
from adacomcat.sites import Site
from adacomcat.utils.inputs import Inputs, call, joined
from adacomcat.utils.model import evaluating, replace_, tokens_and_outputs
from adacomcat.utils.progress import progress


@dataclass(frozen=True)
class Survey:
    """What is known of the sites of a dense model.

    Args:
        factors: site → its factors, or only their errors.
        changes: site → how far tokens and outputs move where it is truncated; None without images.
        in_sequence: whether the model's blocks can be fitted one after the other.
    """

    factors: Factors
    changes: Mapping[str, float] | None
    in_sequence: bool = False

    def weights(self, sites: list[Site], refitted: bool) -> ErrorWeights:
        """What errors count; ``refitted``: the blocks are fitted in sequence afterwards."""
        if self.changes is None:
            return relative_sensitivities(sites, self.factors)
        weights = weights_of_changes(sites, self.changes, self.factors)
        return left_in_sequence(sites, weights) if refitted and self.in_sequence else weights


Keep = Callable[[SiteFactors], SiteFactors]


def errors_alone(factors: SiteFactors) -> SiteFactors:
    """The squared error of every rank, without the factors that have it."""
    return ErrorCurve(factors.errors)


def survey(model: nn.Module, sites: list[Site], batches: list[Inputs] | None,
           keep: Keep = errors_alone) -> Survey:
    """Error curves and sensitivities of ``sites``; data-free without images.

    Args:
        model: the dense model.
        sites: the decisions to take.
        batches: calibration images, from ``calibration_batches``.
        keep: what stays of the factors of a site inside blocks that are fitted in sequence; those
            of other sites stay whole.
    """
    if not sites:
        return Survey({}, None)
    if batches is not None and sequential_blocks(model):
        return _BlockSurvey(model, sites, batches, keep).run()
    factors = factorize_model(model, model_statistics(model, batches, sites), sites=sites)
    changes = None
    if batches is not None:
        changes = probed_changes(model, factors, batches[0][:PROBE_IMAGES], sites)
    return Survey(factors, changes)


class _BlockSurvey:
    """``survey`` of a model with an encoder, the first 64 images long."""

    def __init__(self, model: nn.Module, sites: list[Site], batches: Any,
                 keep: Keep) -> None:
        encoder = sequential_encoder(model)
        assert encoder is not None, "survey asks first"
        self.model, self.sites, self.encoder, self.keep = model, sites, encoder, keep
        self.batches = batches[:ALLOCATION_IMAGES // BATCH]
        self.share = len(self.batches) / len(batches)
        self.probes = batches[0][:PROBE_IMAGES]
        self.factors: dict[str, SiteFactors] = {}
        self.changes: dict[str, float] = {}
        self.thin: list[str] = []

    @torch.no_grad()
    def run(self) -> Survey:
        with evaluating(self.model):
            streams = [self._tokens(images) for images in self.batches]
            self.dense = tokens_and_outputs(self.model, self.probes)
            for index in progress(range(len(self.encoder.blocks)), "calibrating"):
                self._block(index, streams)
            self._outside(streams)
        warn_of_thin(self.thin)
        return Survey(self.factors, self.changes, in_sequence=True)

    def _tokens(self, images: Inputs) -> Tensor:
        try:
            return self.encoder.tokens(images)
        except Exception:
            require_taken(self.model, images)
            raise

    def _block(self, index: int, streams: list[Tensor]) -> None:
        """One block's sites; ``streams`` enter the block before and leave it after."""
        block, prefix = self.encoder.blocks[index], f"{self.encoder.name}.{index}."
        sites = [site for site in self.sites if site.name.startswith(prefix)]
        start = streams[0][:PROBE_IMAGES]
        with watched(self.model, sites) as collectors:
            streams[:] = [self.encoder.step(block, stream) for stream in streams]
        factors = self._factorized(sites, collected(collectors))
        probed = [self._probed(block, start, site, factors) for site in sites]
        for site, change in zip(sites, self._changes(index, probed), strict=True):
            self.changes[site.name] = change
        self.factors |= {name: self.keep(found) for name, found in factors.items()}

    def _factorized(self, sites: list[Site], statistics: Statistics) -> Factors:
        self.thin += [name for name, found in statistics.items()
                      if found.tokens < self.share * len(found.mean)]
        return factorize_model(self.model, statistics, sites=sites)

    def _probed(self, block: nn.Module, start: Tensor, site: Site, factors: Factors) -> Tensor:
        """What leaves ``block`` with this site truncated."""
        whole = self.model.get_submodule(site.module)
        replace_(self.model, site.module, probe_module(whole, site, factors))
        found = self.encoder.step(block, start)
        replace_(self.model, site.module, whole)
        return found

    def _changes(self, index: int, probed: list[Tensor]) -> list[float]:
        """How far tokens and outputs move where these streams leave block ``index``."""
        if not probed:
            return []
        stream = torch.cat(probed)
        for block in list(self.encoder.blocks)[index + 1:]:
            stream = self.encoder.step(block, stream)
        with self._leaving_blocks(stream):
            found = tokens_and_outputs(self.model, joined([self.probes] * len(probed)))
        size = len(self.probes)
        return [relative_change(self.dense, [tensor[at:at + size] for tensor in found])
                for at in range(0, len(stream), size)]

    def _outside(self, streams: list[Tensor]) -> None:
        """The sites that stand in no block."""
        sites = [site for site in self.sites if site.name not in self.changes]
        if not sites:
            return
        with watched(self.model, sites) as collectors:
            for images, stream in zip(self.batches, streams, strict=True):
                with self._leaving_blocks(stream):
                    call(self.model, images)
        self.factors |= self._factorized(sites, collected(collectors))
        for site in sites:
            whole = self.model.get_submodule(site.module)
            replace_(self.model, site.module, probe_module(whole, site, self.factors))
            with self._leaving_blocks(streams[0][:len(self.probes)]):
                found = tokens_and_outputs(self.model, self.probes)
            replace_(self.model, site.module, whole)
            self.changes[site.name] = relative_change(self.dense, found)

    @contextmanager
    def _leaving_blocks(self, stream: Tensor) -> Iterator[None]:
        """Inside, the model's blocks give ``stream``, whatever enters them."""
        replace_(self.model, self.encoder.name, nn.Sequential(_Given(stream)))
        try:
            yield
        finally:
            replace_(self.model, self.encoder.name, self.encoder.blocks)


class _Given(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.tensor
