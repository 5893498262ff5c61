"""What a server lets requests set: how `allow` is read, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.methods.checks import LEAST_NUMBER, MOST_NUMBER
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.policy_names import check_policy_names
from vllm_kvcompress.planning.request_policy import MOST_KERNEL, Bounds, RequestPolicy


def test_by_default_requests_choose_their_method_and_take_less() -> None:
    policy = RequestPolicy.parse(None)
    assert policy == RequestPolicy(
        methods=None, budget=True, params=False, keep=False, decode=False
    )
    assert policy.allows_method("cake")
    assert policy.allows_method("none")
    assert not policy.allows_method("scatter")
    assert RequestPolicy.parse({"method": True, "budget": True}) == policy


def test_what_is_not_named_may_not_be_set() -> None:
    policy = RequestPolicy.parse({})
    assert policy == RequestPolicy(methods=frozenset(), budget=False)
    assert not policy.allows_method("cake")
    assert policy.refusal_of_param("gamma", 1) == "may not be set by requests on this server"
    assert policy.most("window", 128) is None


def test_a_list_of_methods_is_all_there_is() -> None:
    policy = RequestPolicy.parse({"method": ["cake", "scatter"]})
    allowed = [name for name in ("cake", "scatter", "none", "snapkv") if policy.allows_method(name)]
    assert allowed == ["cake", "scatter"]


@pytest.mark.parametrize(
    ("allow", "sentence"),
    [
        ([], "allow must be a mapping with keys method, budget, params, keep, decode, got []"),
        ({"methods": True}, "allow must be a mapping with keys"),
        ({"method": "cake"}, "method must be true, false or a list of names, got 'cake'"),
        ({"method": [1]}, "method must be true, false or a list of names, got [1]"),
        ({"budget": 512}, 'budget must be true, false or bounds such as {"max": 1024}, got 512'),
        (
            {"budget": {}},
            'budget takes bounds as finite numbers under "min", "max" or both, got {}',
        ),
        ({"budget": {"most": 3}}, "budget takes bounds as finite numbers"),
        ({"budget": {"max": True}}, "budget takes bounds as finite numbers"),
        ({"budget": {"max": math.inf}}, "budget takes bounds as finite numbers"),
        ({"budget": {"min": math.nan}}, "budget takes bounds as finite numbers"),
        ({"budget": {"min": 9, "max": 8}}, 'needs a "min" of at most "max", got 9 and 8'),
        ({"params": {"gamma": {"min": 2, "max": 1}}}, 'params: gamma needs a "min" of at most'),
        ({"method": ["cake", "zip"]}, 'allow: unknown method "zip", known are cake, dynamickv'),
        (
            {"params": {"gama": True}},
            'allow: params: no method has a parameter "gama", there are allocator, background',
        ),
        (
            {"params": {"pooling": ["avg", "mean"]}},
            "allow: params: pooling cannot be 'mean' (dynamickv: pooling must be one of avg, max",
        ),
        ({"params": {"scorer": ["snapkv", "zip"]}}, "allow: params: scorer cannot be 'zip'"),
        ({"params": {"pooling": {"max": 3}}}, "allow: params: pooling is no number and takes no"),
        ({"params": ["gamma"]}, "params must be true, false or a mapping, got ['gamma']"),
        ({"params": {"gamma": 1}}, "params: gamma must be true, bounds such as"),
        ({"params": {"gamma": []}}, "params: gamma must be true, bounds such as"),
        ({"keep": -1}, "keep must be true, false or a number of tokens, got -1"),
        ({"keep": 0.5}, "keep must be true, false or a number of tokens, got 0.5"),
        ({"decode": 1}, "decode must be true or false, got 1"),
    ],
)
def test_a_wrong_policy_is_refused_at_start(allow: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_policy_names(RequestPolicy.parse(allow))
    with pytest.raises(ValueError, match=f"^kv_compression: .*{re.escape(sentence)}"):
        KVCompressionConfig.parse({"method": "cake", "allow": allow})


def test_a_share_and_a_number_of_tokens_may_bound_a_budget_together() -> None:
    assert RequestPolicy.parse({"budget": {"min": 128, "max": 0.5}}).budget == Bounds(128, 0.5)


@given(st.floats() | st.integers(), st.integers(-9, 9), st.integers(-9, 9))
def test_a_range_holds_what_lies_between(value: float, low: int, high: int) -> None:
    assert (value in Bounds(low, high)) == (low <= value <= high)
    assert (value in Bounds(low)) == (value >= low)
    assert (value in Bounds(high=high)) == (value <= high)
    assert str(Bounds(low, high)) == f"{low} to {high}"


@pytest.mark.parametrize("value", [True, "1", None, [1], {"a": 1}])
def test_only_numbers_lie_in_a_range(value: object) -> None:
    assert value not in Bounds(0, 2)


RULES = RequestPolicy.parse(
    {"params": {"gamma": {"max": 10}, "pooling": ["avg", "max"], "tau1": True, "tau2": False,
                "scorer": True, "kernel": [3, 5]}}
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("gamma", 10, None),
        ("gamma", 10.5, "must be at most 10 on this server"),
        ("gamma", "10", "must be at most 10 on this server"),
        ("pooling", "avg", None),
        ("pooling", "min", "must be one of avg, max on this server"),
        ("pooling", {"a": []}, "must be one of avg, max on this server"),
        ("tau1", 3, None),
        ("tau2", 3, "may not be set by requests on this server"),
        ("window", 3, "may not be set by requests on this server"),
        ("scorer", "h2o", None),
        ("scorer", {"method": "snapkv", "kernel": 3}, None),
        # What may not be set may not be set by way of a scorer either.
        ("scorer", {"method": "cake", "tau2": 3}, "has 'tau2', which may not be set by requests"),
        ("scorer", {"method": "snapkv", "kernel": 7}, "has 'kernel', which must be one of 3, 5"),
        ("scorer", {"method": {"method": "cake"}}, "must not hold an object under 'method'"),
    ],
)
def test_parameters_follow_their_rules(name: str, value: object, refusal: str | None) -> None:
    found = RULES.refusal_of_param(name, value)
    assert found == refusal if refusal is None else found is not None and refusal in found


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 1e-300, 5e-324, -1e308, 10**400, MOST_NUMBER + 1,
     LEAST_NUMBER / 2, [1e300], [[1]], [{}]],
)  # fmt: skip
def test_parameters_that_may_be_anything_may_not_be_beyond_what_tensors_take(value: object) -> None:
    policy = RequestPolicy.parse({"params": True})
    for name in "gamma", "kernel", "anything":
        assert policy.refusal_of_param(name, value) is not None
        assert policy.refusal_of_param("scorer", {"method": "cake", name: value}) is not None
    # Bounds of the policy's own are the operator's business.
    own = RequestPolicy.parse({"params": {"gamma": {"max": 1e300}}})
    assert own.refusal_of_param("gamma", 1e299) is None


@pytest.mark.parametrize("value", [0, 0.0, 1, -1, LEAST_NUMBER, MOST_NUMBER, True, None, "avg"])
def test_other_values_are_the_methods_to_judge(value: object) -> None:
    assert RequestPolicy.parse({"params": True}).refusal_of_param("gamma", value) is None


def test_pooling_widths_are_bounded() -> None:
    policy = RequestPolicy.parse({"params": True})
    assert policy.refusal_of_param("kernel", MOST_KERNEL) is None
    assert (
        policy.refusal_of_param("kernel", MOST_KERNEL + 2) == "must be at most 129 on this server"
    )


def test_the_most_that_a_parameter_can_be() -> None:
    policy = RequestPolicy.parse(
        {
            "params": {
                "window": {"max": 64},
                "gamma": {"min": 1},
                "kernel": [3, 9],
                "reduce": ["max"],
            }
        }
    )
    assert policy.most("window", 128) == 64
    assert policy.most("gamma", 128) == 128
    assert policy.most("kernel", 128) == 9
    assert policy.most("reduce", 128) is None
    assert policy.most("tau1", 128) is None
    assert RequestPolicy.parse({"params": True}).most("window", 128) == 128
