"""A ledger accounts for every parameter once."""

import math

import pytest

from compressor.errors import IntegrityError
from compressor.reports import ExpertRow, Ledger, LedgerRow, check_complete


def row(name: str, parameters: int, action: str = "quantized", reason: str = "", **rest) -> LedgerRow:
    return LedgerRow(name=name, action=action, reason=reason, parameters=parameters, bits=4.0, **rest)


LEDGER = Ledger(
    weights=(row("q", 60, group_size=64, error=0.01), row("norm", 10, "kept", "norms stay"), row("k", 30)),
    experts=(ExpertRow(layer=1, tokens=(5, 0, 7), starved=(1,), policy=("own", "layer", "own")),),
    blocks=({"block": 0, "seconds": 1.5},),
)


def test_accounted_sums_by_action():
    """Each action has its parameters, those not taken have zero."""
    assert LEDGER.accounted() == (100, {"quantized": 90, "pruned": 0, "trained": 0, "kept": 10})


def test_a_complete_ledger_passes():
    """Total and names agree."""
    check_complete(LEDGER, 100, {"q": 60, "k": 30, "norm": 10})


@pytest.mark.parametrize(
    ("total", "expected", "message"),
    [
        (105, None, r"100 of 105 parameters; 5 parameters missing"),
        (90, None, r"10 parameters too many"),
        (105, {"q": 60, "k": 30, "norm": 10, "v": 5}, r"missing: v"),
        (90, {"q": 60, "k": 30}, r"not in the model: norm"),
        (101, {"q": 60, "k": 31, "norm": 10}, r"k has 31 parameters, its row says 30"),
    ],
)
def test_what_does_not_add_up_is_named(total, expected, message):
    """The error says how many parameters, and which weights where the names are known."""
    with pytest.raises(IntegrityError, match=message):
        check_complete(LEDGER, total, expected)


def test_a_weight_listed_twice_is_named():
    """Two rows of one name are an error even if the total is right."""
    with pytest.raises(IntegrityError, match="listed twice: q"):
        check_complete(Ledger(weights=(row("q", 60), row("q", 40))), 100)


def test_json_survives_reading():
    """A ledger comes back equal."""
    assert Ledger.from_json(LEDGER.to_json()) == LEDGER


def test_an_error_that_is_not_finite_becomes_null():
    """JSON has no NaN."""
    assert row("q", 1, error=math.nan).to_json()["error"] is None


def test_a_kept_weight_needs_a_reason():
    """Nothing is left alone silently."""
    with pytest.raises(ValueError, match="norm: a weight that is kept needs a reason"):
        row("norm", 1, "kept")


def test_an_unknown_action_is_refused():
    """The list of actions is closed, since reports sum over it."""
    with pytest.raises(ValueError, match=r"'skipped'; it is one of quantized, pruned, trained, kept"):
        row("norm", 1, "skipped")


def test_ledgers_of_blocks_add_up():
    """Rows of a second block follow those of the first."""
    merged = LEDGER.merge(Ledger(weights=(row("v", 5),)))
    assert [weight.name for weight in merged.weights] == ["q", "norm", "k", "v"]
    assert merged.accounted()[0] == 105
