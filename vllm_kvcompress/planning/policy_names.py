"""Whether the methods, parameters and values that a request policy names exist."""

from collections.abc import Sequence

from vllm_kvcompress.methods import ROLES, available, get_method, get_spec
from vllm_kvcompress.planning.request_policy import Bounds, RequestPolicy


def check_policy_names(policy: RequestPolicy) -> None:
    """Refuse a policy that allows what no method is, has or takes.

    Raises:
        ValueError: One sentence that names the entry and what there is.

    """
    for name in sorted(policy.methods or ()):
        if name not in available():
            raise ValueError(f'allow: unknown method "{name}", known are {", ".join(available())}')
    if isinstance(policy.params, bool):
        return
    parameters = {name: get_spec(name).parameters for name in available()}
    known = sorted({*ROLES, *(param for own in parameters.values() for param in own)})
    for param, rule in policy.params.items():
        if param not in known:
            raise ValueError(
                f'allow: params: no method has a parameter "{param}", there are {", ".join(known)}'
            )
        having = [name for name, own in parameters.items() if param in own] or list(parameters)
        if isinstance(rule, tuple):
            _check_choices(param, rule, having)
        elif isinstance(rule, Bounds) and not any(
            _takes_numbers(parameters[name].get(param, "")) for name in having
        ):
            raise ValueError(
                f"allow: params: {param} is no number and takes no bounds; allow true or a list of "
                "choices"
            )


def _check_choices(param: str, choices: Sequence[object], having: Sequence[str]) -> None:
    for choice in choices:
        refusals = [_refusal(name, param, choice) for name in having]
        if None not in refusals:
            raise ValueError(f"allow: params: {param} cannot be {choice!r} ({refusals[0]})")


def _takes_numbers(default: object) -> bool:
    return not isinstance(default, str | bool)  # None stands for a number as well


def _refusal(name: str, param: str, value: object) -> str | None:
    try:
        get_method(name, {param: value})
    except ValueError as error:
        return str(error)
    return None
