"""Which source the engine replaces: digests of the LeRobot functions whose work it takes over.

A version string says little (forks, editable installs, a patched method); the source says it all. A function whose
digest is not listed, a subclass that overrides one, or a method replaced on an instance sends every call to stock.
``python -m smolvla_fast.patching.source_digests`` prints the table for the LeRobot that is installed.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .untried import Untried

MODEL_METHODS = ("sample_actions", "embed_prefix", "embed_suffix", "denoise_step", "_rtc_enabled")
LOSS_METHODS = ("forward", "embed_prefix", "embed_suffix")
"""What the fast training step replaces, or calls."""
PAIR_METHODS = (
    "forward", "forward_attn_layer", "forward_cross_attn_layer", "embed_image", "embed_language_tokens", "get_vlm_model",
    "get_model_layers", "get_attention_interface", "eager_attention_forward",
)  # fmt: skip
RTC_METHODS = (
    "denoise_step", "get_prefix_weights", "_linweights", "_add_trailing_zeros", "_add_leading_ones",
)  # fmt: skip
FUNCTIONS = (
    "apply_rope", "create_sinusoidal_pos_embedding", "euler_integrate", "make_att_2d_masks", "pad_tensor",
)  # fmt: skip
"""Module-level functions that the methods call; looked up where the methods find them."""

_LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)

_SAME_SINCE_0_4_4 = {
    "RTCProcessor._add_leading_ones": "5619d89cd659",
    "RTCProcessor._add_trailing_zeros": "e7ce01f827a4",
    "RTCProcessor._linweights": "2d2a1c55926e",
    "RTCProcessor.denoise_step": "a9cd6317fdef",
    "RTCProcessor.get_prefix_weights": "f1b46736e57e",
    "SmolVLMWithExpertModel.eager_attention_forward": "7fddedc99721",
    "SmolVLMWithExpertModel.embed_image": "135638df1260",
    "SmolVLMWithExpertModel.embed_language_tokens": "b4e3334ea714",
    "SmolVLMWithExpertModel.get_attention_interface": "2f02728799fe",
    "SmolVLMWithExpertModel.get_model_layers": "42d5fc98970c",
    "SmolVLMWithExpertModel.get_vlm_model": "210012569b60",
    "VLAFlowMatching._rtc_enabled": "d83e24688bde",
    "VLAFlowMatching.embed_prefix": "488b16ee9bc0",
    "VLAFlowMatching.embed_suffix": "8459142fe124",
    "apply_rope": "9deaa642c2e6",
    "pad_tensor": "12e2a2c60647",
}
KNOWN: dict[str, dict[str, str]] = {
    # In 0.5.1 not one of these functions differs: its own change to SmolVLA is in the training loss.
    "0.4.4, 0.5.1": {
        **_SAME_SINCE_0_4_4,
        "SmolVLMWithExpertModel.forward": "49ca3d941ecf",
        "SmolVLMWithExpertModel.forward_attn_layer": "4359f8148fd2",
        "SmolVLMWithExpertModel.forward_cross_attn_layer": "b20c09b231fb",
        "VLAFlowMatching.denoise_step": "4a2b507a4003",
        "VLAFlowMatching.forward": "3439b0f47889",
        "VLAFlowMatching.sample_actions": "3671145bae24",
        "create_sinusoidal_pos_embedding": "55da88f020a7",
        "make_att_2d_masks": "48addca29b91",
    },
    "0.6.1": {
        **_SAME_SINCE_0_4_4,
        "SmolVLMWithExpertModel.forward": "6eb353741f80",
        "SmolVLMWithExpertModel.forward_attn_layer": "5dd704fc1765",
        "SmolVLMWithExpertModel.forward_cross_attn_layer": "5786cdd82d34",
        "VLAFlowMatching.denoise_step": "6b0a4a498a3f",
        "VLAFlowMatching.forward": "17fe20e6a941",
        "VLAFlowMatching.sample_actions": "8c0b9f66f469",
        "create_sinusoidal_pos_embedding": "78b4eda5b0f2",
        "euler_integrate": "5951c1df6e60",
        "make_att_2d_masks": "6db0c597725e",
    },
}


@cache
def digest(function: Callable[..., Any]) -> str:
    """First 12 hex digits of the SHA-256 of a function's source, without docstrings, comments and white space."""
    if hasattr(function, "__wrapped__"):
        return "wrapped"  # its source is the inner function's, what it does is not
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return "no source"
    kept: list[str] = []
    statement_begins = True
    for token, following in zip(tokens, tokens[1:] + tokens[-1:], strict=True):
        if token.type in _LAYOUT:
            statement_begins = statement_begins or token.type != tokenize.NL
            continue
        docstring = statement_begins and token.type == tokenize.STRING and following.type == tokenize.NEWLINE
        if token.type != tokenize.COMMENT and not docstring:
            kept.append(token.string)
        statement_begins = False
    return hashlib.sha256("".join(kept).encode()).hexdigest()[:12]


class Found(NamedTuple):
    """A function that is replaced, or called.

    home  the class that defines it, of a method; the module-level method that calls it, of a helper
    """

    name: str
    function: Callable[..., Any]
    home: Any


Owner = tuple[str, Any, tuple[str, ...]]
"""The name of a class in LeRobot, an object of it or None, and the methods that are replaced, or called."""


def owners(model: Any, rtc: Any | None = None, methods: tuple[str, ...] = MODEL_METHODS) -> list[Owner]:
    """model  a ``VLAFlowMatching``      rtc  its ``RTCProcessor``, or None      methods  of the model"""
    pair = ("SmolVLMWithExpertModel", model.vlm_with_expert, PAIR_METHODS)
    return [("VLAFlowMatching", model, methods), pair, ("RTCProcessor", rtc, RTC_METHODS)]


def _homes(cls: type, name: str) -> list[type]:
    """The classes that define a method, without what ``patch`` puts before them; somebody may have made a subclass of
    that, or set a method of his own on it."""
    return [
        base
        for base in cls.__mro__
        if name in vars(base)
        and base is not nn.Module
        and not base.__module__.startswith("smolvla_fast.patch")
        and not _is_ours(base, name)
    ]


def _is_ours(base: type, name: str) -> bool:
    """Whether ``patch`` put the method there, or it is one that runs before the rules are asked, and so is not passed by."""
    overrides = vars(base).get("overrides")
    entry = name in ("sample_actions", "forward") and hasattr(base, "sample_actions")
    return overrides is not None and (entry or vars(base)[name] is overrides.get(name))


def _functions(of: list[Owner]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for label, owner, names in of:
        for name in names if owner is not None else ():
            homes = _homes(type(owner), name)
            method = owner.__dict__.get(name) or (getattr(homes[0], name) if homes else None)
            if method is not None:
                own = getattr(method, "__func__", method)
                home = homes[0] if len(homes) == 1 and name not in owner.__dict__ else None
                found[f"{label}.{name}"] = Found(name, own, home)
                for helper in FUNCTIONS:
                    if helper in getattr(own, "__globals__", {}):
                        found[helper] = Found(helper, own.__globals__[helper], own)
    return found


def _is_lerobots_own(found: Found) -> bool:
    """Whether a function stands where LeRobot would have written it: in the body of the one class that has it, or in the
    package of the method that calls it. What is put there from outside, or over it in a subclass, is somebody's wish."""
    function, home = found.function, found.home
    if hasattr(function, "__wrapped__") or not hasattr(function, "__code__") or home is None:
        return False
    return function.__module__.partition(".")[0] == home.__module__.partition(".")[0]


def unknown_of(of: list[Owner]) -> str | None:
    """None if every function of these is one we know, else which one is not. ``Untried`` where all that is not known is
    LeRobot's own, of a release that nobody read."""
    versions: set[str] | None = None
    unread, known = "", []
    for name, found in _functions(of).items():
        function = found.function
        if getattr(function, "__module__", "").startswith("smolvla_fast."):
            continue
        mark = digest(function)
        fits = {version for version, table in KNOWN.items() if table.get(name) == mark}
        known.append(function)
        versions = fits if versions is None else versions & fits
        if versions:
            continue
        where = f"{function.__module__}.{getattr(function, '__qualname__', name)}"
        reason = f"{name} is {where}, not the source this release knows (lerobot {', '.join(KNOWN)})"
        if not fits and not _is_lerobots_own(found):
            return reason
        unread = unread or reason
    # Code by value: a source that changes under a live policy is another question.
    code = ((each.__code__, repr(each.__defaults__), repr(each.__kwdefaults__)) for each in known)
    return Untried(unread, *code) if unread else None


def _print_table() -> None:
    from importlib.metadata import version

    from lerobot.policies.rtc.modeling_rtc import RTCProcessor
    from lerobot.policies.smolvla import modeling_smolvla

    class _Instance:
        """Replaces an object of a class without building the model."""

    def instance_of(cls: type, **attributes: Any) -> Any:
        made: Any = object.__new__(type(cls.__name__, (_Instance,), {"stock_class": cls}))
        made.__dict__.update(attributes)
        return made

    pair = instance_of(modeling_smolvla.SmolVLMWithExpertModel)
    model = instance_of(modeling_smolvla.VLAFlowMatching, vlm_with_expert=pair)
    found = _functions(owners(model, instance_of(RTCProcessor), (*MODEL_METHODS, "forward")))
    print(f'    "{version("lerobot")}": {{')
    for name in sorted(found):
        print(f'        "{name}": "{digest(found[name].function)}",')
    print("    },")


if __name__ == "__main__":
    _print_table()
