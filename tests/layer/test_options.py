"""Options check themselves when they are set, by whatever way of setting a dict has."""

import copy
import pickle

from scratchbn import ScratchBatchNorm
from scratchbn.variants import BatchRenorm, GhostBatchNorm

# isort: split
import pytest

WRONG = [
    ("axis", 1.5, TypeError, "axis must be an integer, got 1.5"),
    ("eps", -1, ValueError, "epsilon must be finite and not negative, got -1"),
    ("eps", "1e-3", TypeError, "epsilon must be a number, got '1e-3'"),
    ("momentum", 2, ValueError, "momentum must be between 0 and 1, or None, got 2"),
    ("fix_gamma", 1, TypeError, "fix_gamma must be True or False, got 1"),
    ("center", None, TypeError, "center must be True or False, got None"),
    ("use_global_stats", "no", TypeError, "use_global_stats must be True or False"),
    ("unbiased_variance", 0, TypeError, "unbiased_variance must be True or False"),
]
WAYS = {
    "item": lambda options, key, value: options.__setitem__(key, value),
    "update": lambda options, key, value: options.update({key: value}),
    "keyword": lambda options, key, value: options.update(**{key: value}),
    "or": lambda options, key, value: options.__ior__({key: value}),
    "setdefault": lambda options, key, value: (options.pop(key), options.setdefault(key, value)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("key", "value", "error", "message"), WRONG)
def test_a_wrong_value_is_refused_when_it_is_set(way, key, value, error, message):
    options = ScratchBatchNorm()._kwargs
    before = dict(options)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        WAYS[way](options, key, value)
    if way == "setdefault":
        assert key not in options
    else:
        assert options == before


def test_one_wrong_value_changes_none():
    options = ScratchBatchNorm().options
    with pytest.raises(ValueError, match="momentum"):
        options.update(eps=0.5, momentum=7)
    assert options.epsilon == 1e-5


def test_one_dict_under_two_names():
    layer = ScratchBatchNorm(epsilon=0.5, scale=False, axis=-1)
    assert layer.options is layer._kwargs
    assert (layer.options.epsilon, layer.options.scale, layer.options.axis) == (0.5, False, -1)
    layer._kwargs["eps"], layer._kwargs["fix_gamma"] = 0.25, False
    assert (layer.options.epsilon, layer.options.scale) == (0.25, True)
    assert layer.options.arguments() == {
        "axis": -1,
        "momentum": 0.9,
        "epsilon": 0.25,
        "center": True,
        "scale": True,
        "use_global_stats": False,
        "unbiased_variance": False,
    }
    with pytest.raises(AttributeError, match="there is no option 'gamma'"):
        layer.options.gamma  # noqa: B018


def test_an_attribute_is_the_option_itself():
    options = ScratchBatchNorm().options
    options.epsilon, options.scale, options.momentum = 0.5, False, 0.25
    assert (options["eps"], options["fix_gamma"], options["momentum"]) == (0.5, True, 0.25)
    assert not vars(options)
    for name, value, error, said in [
        ("momentum", 2, ValueError, "momentum must be between 0 and 1, or None, got 2"),
        ("scale", 1, TypeError, "scale must be True or False, got 1"),
        ("epsilom", 1, AttributeError, "there is no option 'epsilom'"),
    ]:
        with pytest.raises(error, match=said):
            setattr(options, name, value)
    assert (options.epsilon, options.scale, options.momentum) == (0.5, False, 0.25)


def pickled(options):
    return pickle.loads(pickle.dumps(options))


@pytest.mark.parametrize("layer", [ScratchBatchNorm(), GhostBatchNorm(4), BatchRenorm(2, 1)])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_copy_checks_too(layer, duplicate):
    options = duplicate(layer.options)
    assert options == layer.options
    assert type(options) is type(layer.options)
    options["momentum"] = 0.5
    assert layer.options.momentum == 0.9
    with pytest.raises(ValueError, match="epsilon"):
        options["eps"] = -1


def test_variants_have_options_of_their_own():
    ghost, renorm = GhostBatchNorm(4), BatchRenorm(2, 1)
    with pytest.raises(ValueError, match="ghost_size must be at least 1, got 0"):
        ghost.options["ghost_size"] = 0
    with pytest.raises(ValueError, match="axis must not be 0, the batch axis"):
        ghost.options["axis"] = 0
    with pytest.raises(ValueError, match="r_max must be finite and at least 1, got 0"):
        renorm.r_max = 0
    assert (renorm.r_max, renorm.options.d_max) == (2, 1)
    assert list(ghost.options.arguments())[:2] == ["ghost_size", "axis"]
