"""What is kept beside a patched ``SmolVLMWithExpertModel``: its ``LayerEngine``, and who served which kind of layer."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

from ..engine import plan_files
from ..engine.plan_key import key_of, shapes_of
from ..engine.products import Products
from ..layers.engine import LayerEngine
from ..model.precision import Tier, resolve_tier
from ..model.weights import representative_weight
from ..ops.plan import Plan
from .change_detector import ChangeDetector, detector_of
from .eligibility import LAYERS
from .probe import probe, probed_code
from .served import Registry, Served
from .settings import SETTINGS, Settings, disabled


class LayerRuntime(Served[LayerEngine]):
    """Of one pair; the chunks of its policy multiply with the same ``Products``.

    counts  (method, whether the engine served it) -> calls
    """

    eligibility, work, level = LAYERS, "call below sample_actions", logging.INFO

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, bool]] = Counter()
        self._products: tuple[tuple[Any, ...], Products] | None = None
        self._expert: ChangeDetector | None = None
        self._noted_with: ChangeDetector | None = None  # the whole pair's, when the expert's was noted
        self.patched_by: WeakKeyDictionary[Any, Settings] = WeakKeyDictionary()
        self._probed: tuple[Any, str | None] = (None, None)

    def look(self, model: Any) -> tuple[LayerEngine | None, str | None]:
        wishes = {(each.precision, each.backend, each.tune) for each in self.patched_by.values()}
        if len(wishes) > 1:
            return None, "two policies that share it are patched with other settings; patch them alike"
        return super().look(model)

    def look_for_step(self, pair: Any) -> tuple[LayerEngine | None, str | None]:
        """The same for what reads the expert alone, ten times a chunk: a third of the modules are looked through."""
        with self.lock:
            noted, settings = self._expert, pair.__dict__.get(SETTINGS)
            as_noted = self._noted_with is self.detector and settings is self.settings and not disabled()
            if as_noted and noted is not None and len(self.patched_by) < 2 and noted.same(pair.lm_expert):
                reason = self._refusal or self.eligibility.live_reason(pair)
                return self.engine if reason is None else None, reason
            engine, reason = self.look(pair)
            self._expert, self._noted_with = (
                (detector_of(pair.lm_expert), self.detector) if engine else (None, None)
            )
            return engine, reason

    def products(self, pair: Any, tier: Tier, settings: Settings, device: Any) -> Products:
        """One for a tier, backend, device and the shapes of a pair: quantised copies are made once, a plan is looked for
        once."""
        with self.lock:
            shapes = shapes_of(pair)
            key = (tier, settings.backend, settings.tune, device, shapes)
            if self._products is None or self._products[0] != key:
                plan = self.plan(pair, tier, settings, device)
                self._products = key, Products(tier, settings.backend, device, plan)
            return self._products[1]

    def look_for_plan(self, pair: Any, settings: Settings) -> Products | None:
        """What chunks and layers multiply with from their next look on, by the plan that is found now; quantised copies
        stay. None where nothing was made yet."""
        with self.lock:
            if self._products is None:
                return None
            key, products = self._products
            plan = self.plan(pair, products.tier, settings, products.device)
            if plan != products.plan:
                self._products = key, products.by(plan)
                self.engine, self.detector = None, None
            return self._products[1]

    def plan(self, pair: Any, tier: Tier, settings: Settings, device: Any) -> Plan | None:
        if settings.tune == "off" or tier.stock_order:
            return None
        return plan_files.find(key_of(pair, tier.name, settings.backend, device))[0]

    def prepare(self, pair: Any, settings: Settings) -> str | None:
        weight = representative_weight(pair)
        tier = resolve_tier(settings.precision, weight.dtype)
        products = self.products(pair, tier, settings, weight.device)
        if self.engine is None or self.engine.products is not products:
            self.engine = LayerEngine(products)
        return self.probe_reason(pair, tier)

    def probe_reason(self, pair: Any, tier: Tier) -> str | None:
        """Why the live modules are not what the engine computes in their place; asked once for a state of them."""
        with self.lock:
            code = (tier, [(x.dtype, x.device) for x in pair.parameters()], probed_code(pair))
            if self._probed[0] != code:
                # A load in another thread may change a weight between two sides of a comparison: asked twice.
                exact = tier.stock_order
                self._probed = code, probe(pair, exact) and probe(pair, exact)
            return self._probed[1]

    def count(self, method: str, reason: str | None) -> None:
        with self.lock:
            self.counts[method, reason is None] += 1
        if reason is not None:
            self.fell_back(reason)
            self.last_fallback = f"{method}: {reason}"

    def calls(self, fast: bool) -> dict[str, int]:
        return {method: n for (method, by_engine), n in sorted(self.counts.items()) if by_engine is fast}

    def forget(self) -> None:
        with self.lock:
            self._products, self._probed = None, (None, None)
            super().forget()


LAYER_RUNTIMES: Registry[LayerRuntime] = Registry(LayerRuntime)
