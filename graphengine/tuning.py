"""Which way does each product of a decode step run in? As files say, or as is measured once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
import triton

from captures import Streams
from graphengine.kernels.decode_chain import DecodeChain
from graphengine.kernels.fused_linear import means_on
from graphengine.kernels.tuned import TunedKernels
from graphengine.kernels.ways import Product, Way, ways
from graphengine.model import DecoderModel
from graphengine.resolve import Resolved, own_tuning_file, tuned_shape
from graphengine.tuning_file import CACHE, Choices, file_in
from graphengine.tuning_trial import products_to_tune, try_all, tune
from graphengine.version import __version__


class Tuning:
    """The kernels of an engine on a GPU, and which of its products are still to be measured.

    What is measured is kept in the user's cache for a card, its software and a model's shape: all
    that runs there later runs alike. A folder of the user's own (see EngineConfig.tuning) is asked
    before the cache, and by a model's shape and the kind of GPU alone, so that what goes on with it
    rounds as what began with it did; it gets what it lacks."""

    def __init__(self, resolved: Resolved) -> None:
        config, device = resolved.model_config, resolved.device
        model = tuned_shape(config, device=device, dtype=resolved.dtype)
        made_for = {
            **model,
            "card": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "graphengine": __version__,
        }
        cache = None
        own = own_tuning_file(resolved.config, config, device, resolved.dtype)
        with contextlib.suppress(RuntimeError):  # no home
            cache = file_in(CACHE.expanduser(), made_for)
        means = means_on(device, resolved.dtype, has_bias=config.mlp_bias)
        is_chained = DecodeChain.takes(config, dtype=resolved.dtype, device=device)
        num_chained = DecodeChain.max_rows if is_chained else 0
        products = products_to_tune(config, resolved.ladder, num_chained=num_chained)
        self._choices = Choices(
            {p: ways(p, means) for p in products}, made_for, own=own, cache=cache
        )
        self.kernels = TunedKernels(self._choices.chosen)

    def rehearse(self, model: DecoderModel) -> None:
        """In a rehearsal: has compiled what `measure` will launch."""
        try_all(model, self.kernels, self._choices.missing)

    def measure(self, model: DecoderModel, streams: Streams) -> None:
        """Measures what is missing, on the model's weights, and keeps it. Blocks until done; may
        wait for another process first. Not within model.exclusive()."""

        def find(missing: Mapping[Product, Mapping[str, Way]]) -> dict[Product, str]:
            with model.exclusive():
                return tune(model, self.kernels, missing, streams)

        self._choices.complete(find)
