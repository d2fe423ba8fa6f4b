"""The tiny world: repeatable, honest about what it holds out, and wrong only where it means to be."""

import itertools
import re

import pytest

from megatron_octo.data.world import KINDS, QUESTION_TEMPLATE, World, WorldConfig
from megatron_octo.errors import ConfigError

CAREFUL = WorldConfig(slip_rate=0.0, unboxed_rate=0.0)
EQUATION = re.compile(r"(\d+)([+-]\d+)=(\d+)\.")
STORY = re.compile(r"has (\d+) \w+((?:, \w+ \d+)+)\.")
EXPRESSION = re.compile(r"\d+(?:[+-]\d+){2,}")
SIGNS = {"finds": "+", "buys": "+", "sells": "-", "loses": "-"}


def compositions(text: str) -> set[str]:
    """Every two-step computation that a text tells, writes out or works through."""
    found = set(EXPRESSION.findall(text))
    for start, changes in STORY.findall(text):
        found.add(start + "".join(SIGNS[verb] + n for verb, n in re.findall(r"(\w+) (\d+)", changes)))
    for first, second in itertools.pairwise(EQUATION.finditer(text)):
        between = text[first.end() : second.start()]
        if first[3] == second[1] and between in (" ", " Then, "):
            found.add(first[1] + first[2] + second[2])
    return found


def documents(world: World, count: int = 1500) -> list[tuple[str, str]]:
    return [(kind, text) for kind in KINDS for text in world.documents(kind, count)]


def test_the_same_seed_writes_the_same_world():
    for kind in KINDS:
        first = list(World(seed=3).documents(kind, 40, "stable"))
        assert first == list(World(seed=3).documents(kind, 40, "stable"))
        assert first != list(World(seed=4).documents(kind, 40, "stable"))
        assert first != list(World(seed=3).documents(kind, 40, "decay"))
    assert list(World(seed=3).problems("train", 40)) == list(World(seed=3).problems("train", 40))
    assert list(World(seed=3).problems("train", 40)) != list(World(seed=3).problems("train", 40, "other"))


def test_a_longer_request_only_goes_on():
    world = World()
    assert list(world.documents("web", 50))[:20] == list(world.documents("web", 20))


def test_one_iterator_does_not_disturb_another():
    world = World()
    interleaved = list(zip(world.documents("web", 20), world.documents("short_cot", 20), strict=True))
    assert [web for web, _ in interleaved] == list(world.documents("web", 20))


def test_the_detector_of_compositions_sees_each_form():
    assert compositions("Ana has 7 pens, buys 5, sells 3. How many now?") == {"7+5-3"}
    assert compositions("In short: 7+5-3.") == {"7+5-3"}
    assert compositions("We count: First, 7+5=12. Then, 12-3=9.") == {"7+5-3"}
    assert compositions("Some facts: 7+5=12. 11-3=8. 8-2=6.") == {"11-3-2"}


@pytest.mark.parametrize("config", [WorldConfig(), CAREFUL, WorldConfig(slip_rate=1.0, noticed_rate=1.0)])
def test_held_out_computations_never_occur_in_training(config):
    world = World(config)
    heldout = {p.id for p in world.problems("heldout", world.available("heldout"))}
    trained = {p.id for p in world.problems("train", world.available("train"))}
    assert not heldout & trained
    for kind in KINDS:
        told = set().union(*(compositions(text) for text in world.documents(kind, 2000)))
        assert len(told) > 400, f"{kind}: the detector found almost nothing, so the check proves nothing"
        assert not told & heldout, kind


def test_what_is_held_out_does_not_depend_on_the_seed():
    one, other = World(seed=0), World(seed=9)
    everything = [{p.id for p in world.problems("heldout", world.available("heldout"))} for world in (one, other)]
    assert everything[0] == everything[1]
    share = one.available("heldout") / (one.available("heldout") + one.available("train"))
    assert abs(share - WorldConfig().heldout_share) < 0.05


def test_every_single_step_is_seen_in_training():
    world = World()
    told = {m[0] for text in world.documents("web", 4000) for m in EQUATION.finditer(text)}
    asked = set()
    for problem in world.problems("heldout", world.available("heldout")):
        total, *changes = [int(n) for n in re.findall(r"[+-]?\d+", problem.id)]
        for change in changes:
            asked.add(f"{total}{change:+d}={total + change}.")
            total += change
    assert asked <= told


def test_problems_are_distinct_and_rightly_answered():
    for split in ("train", "heldout"):
        problems = list(World().problems(split, 200))
        assert len({p.id for p in problems}) == 200
        for problem in problems:
            assert compositions(problem.question) == {problem.id}
            assert int(problem.answer) == sum(int(n) for n in re.findall(r"[+-]?\d+", problem.id))


def test_a_careful_world_makes_no_mistake():
    for kind, text in documents(World(CAREFUL)):
        for a, change, b in EQUATION.findall(text):
            assert int(a) + int(change) == int(b), text
        if kind.endswith("_cot"):
            (told,) = compositions(text.split("How many")[0])
            right = sum(int(n) for n in re.findall(r"[+-]?\d+", told))
            assert re.findall(r"\\boxed\{(\d+)\}\.$", text) == [str(right)], text


def test_only_worked_answers_slip_and_at_the_stated_rate():
    wrong = dict.fromkeys(KINDS, 0)
    for kind, text in documents(World(), 2000):
        wrong[kind] += any(int(a) + int(change) != int(b) for a, change, b in EQUATION.findall(text))
    assert wrong["web"] == wrong["instruction"] == 0
    for kind in ("short_cot", "long_cot"):
        assert abs(wrong[kind] / 2000 - WorldConfig().slip_rate) < 0.04


def test_a_share_of_worked_answers_has_no_box():
    for kind in ("short_cot", "long_cot"):
        texts = list(World().documents(kind, 2000))
        unboxed = sum(r"\boxed" not in text for text in texts)
        assert abs(unboxed / 2000 - WorldConfig().unboxed_rate) < 0.04
        assert all(text.count(r"\boxed{") <= 1 and text.endswith(".") for text in texts)


def test_a_noticed_slip_is_repaired():
    world = World(WorldConfig(slip_rate=1.0, noticed_rate=1.0, unboxed_rate=0.0))
    repaired = 0
    for text in world.documents("long_cot", 300):
        (told,) = compositions(text.split("How many")[0])
        right = sum(int(n) for n in re.findall(r"[+-]?\d+", told))
        assert text.endswith(rf"\boxed{{{right}}}."), text
        repaired += "No, that is wrong." in text
    assert repaired > 250


def test_worked_documents_follow_the_prompt_template():
    prefix, suffix = QUESTION_TEMPLATE.split("{question}")
    for kind in ("short_cot", "long_cot"):
        for text in World().documents(kind, 50):
            prompt, answer = text.split(suffix)
            assert prompt.startswith(prefix) and answer.startswith(" ")
    assert all(text.startswith("User: ") and "\nAssistant: " in text for text in World().documents("instruction", 50))


def test_long_answers_are_longer():
    short, long = (list(World().documents(kind, 300)) for kind in ("short_cot", "long_cot"))
    answers = [sum(len(text.split("Answer:")[1]) for text in texts) for texts in (short, long)]
    assert answers[1] > 1.5 * answers[0]


@pytest.mark.parametrize(
    "values",
    [{"highest_number": 2}, {"largest_change": 0}, {"largest_change": 20}, {"steps": 4}, {"slip_rate": 1.5}],
)
def test_a_world_that_cannot_be_is_refused_by_field(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        WorldConfig(**values)


def test_requests_that_cannot_be_met_are_refused():
    world = World()
    with pytest.raises(ConfigError, match="prose"):
        world.documents("prose", 1)
    with pytest.raises(ConfigError, match="test"):
        world.problems("test", 1)
    with pytest.raises(ConfigError, match=str(world.available("heldout"))):
        world.problems("heldout", 10_000)
    with pytest.raises(ConfigError, match="empty"):
        World(WorldConfig(heldout_share=0.0))
