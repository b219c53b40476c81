"""The table of checks itself: complete and up to date."""

from __future__ import annotations

from support.checks import (
    CPU,
    DOCUMENT,
    DRIVER,
    GPU,
    NO_TEST,
    STATEMENTS,
    markdown,
    places,
)


def test_every_check_has_a_test_or_a_reason() -> None:
    shown = {place.number for place in places() if place.path.startswith("tests/acceptance/")}
    assert sorted(STATEMENTS) == list(range(1, 64))
    assert {place.number for place in places()} <= STATEMENTS.keys()
    assert sorted(shown | NO_TEST.keys()) == list(range(1, 64))


def test_the_table_is_what_the_tests_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), "run `make acceptance`"


def test_places_are_read_from_the_sources() -> None:
    found = {(place.number, place.path.split("/")[-1], place.where) for place in places()}
    assert (53, "test_threads_and_graphs.py", DRIVER) in found, "usefixtures of a test"
    assert (19, "test_cuda_graphs.py", DRIVER) in found, "usefixtures of a module"
    assert (53, "test_chunk_on_device.py", GPU) in found, "a mark of a module"
    assert (24, "test_queue_and_outputs.py", CPU) in found
    assert {place.number for place in places() if place.test == "test_lora_as_lerobot_wraps_it"} == {17}
