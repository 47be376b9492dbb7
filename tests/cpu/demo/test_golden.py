"""The golden prompts that engines are held to are the oracle's answers, and far from ties."""

from tests.golden.make import COUNT, MARGIN, faults, read


def test_the_file_is_what_the_oracle_says() -> None:
    assert list(faults(read())) == []


def test_prompts_differ_and_cover_every_kind_of_turn() -> None:
    golden = read()
    assert golden.margin == MARGIN and len(golden.prompts) == COUNT
    assert len({tuple(prompt.prompt) for prompt in golden.prompts}) == COUNT
    assert len({prompt.kind for prompt in golden.prompts}) == 8
    lengths = sorted(len(prompt.prompt) for prompt in golden.prompts)
    assert lengths[0] < 32 and lengths[-1] > 1024, lengths


def test_a_wrong_file_is_noticed() -> None:
    """A changed answer, a promised lead that is not there, other weights: each is said."""
    golden = read()
    first = golden.prompts[0]
    wrong = [*first.answer[:-2], first.answer[-2] + 1, first.answer[-1]]
    object.__setattr__(first, "answer", wrong)
    object.__setattr__(golden, "margin", 100.0)
    said = list(faults(golden))
    assert any("prompt 0: the oracle answers otherwise" in fault for fault in said)
    assert sum("the file promises" in fault for fault in said) == COUNT
    object.__setattr__(golden, "checkpoint_sha256", "0" * 64)
    assert [*faults(golden)] == ["the file was made for other weights than the shipped ones"]
