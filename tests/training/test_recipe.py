"""Recipes: what they hold, their files, what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from reg_kernels.training import METHODS, Recipe


def test_each_method_is_a_field_that_is_off_and_can_be_switched_on() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for name, method in METHODS.items():
        assert type(fields[name]) is type(method.on) is method.kind, name
        assert fields[name] == (True if name == "batch_norm" else method.off)
        on = Recipe(model=method.models[0]).with_methods([name], METHODS)
        assert on.methods() == {name: method.on}
        least, most = method.search
        assert method.limits[0] <= least < most <= method.limits[1]
        assert not method.log or least > 0


def test_a_file_says_all_of_a_recipe() -> None:
    recipe = Recipe(model="resnet", epochs=3, learning_rate=0.1 / 3, batch_norm=False, l1=1e-300)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_toml("dropout = 1e-1\naugment = 1") == Recipe(dropout=0.1, augment=1.0)
    assert Recipe.from_toml("l2 = 1.0", base=recipe) == dataclasses.replace(recipe, l2=1.0)


def test_methods_keep_the_strengths_that_a_recipe_has() -> None:
    recipe = Recipe(dropout=0.3, noise=0.7)
    mixed = recipe.with_methods(["dropout", "mixup"], ["dropout", "mixup", "batch_norm", "cutmix"])
    assert mixed.methods() == {"dropout": 0.3, "mixup": METHODS["mixup"].on, "noise": 0.7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout = 1.0", "dropout must be in [0, 1), got 1"),
        ("label_smoothing = 1.5", "label_smoothing must be in [0, 1], got 1.5"),
        ("l1 = -1.0", "l1 must be finite and at least 0, got -1"),
        ("noise = inf", "noise must be finite and at least 0, got inf"),
        ("noise = nan", "noise must be finite and at least 0, got nan"),
        ("early_stopping = -1", "early_stopping must be finite and at least 0, got -1"),
        ("early_stopping = 1.5", "early_stopping must be of type int, got 1.5 of type float"),
        ("epochs = true", "epochs must be of type int, got True of type bool"),
        ("batch_norm = 1", "batch_norm must be of type bool, got 1 of type int"),
        ("epochs = 0", "epochs must be at least 1, got 0"),
        ("learning_rate = 0", "learning_rate must be finite and above 0, got 0"),
        ("model = 'convnet'", "model must be one of conv, resnet, mlp, mixer, got 'convnet'"),
        ("drop_path = 0.1", "drop_path goes with the models resnet, mixer, got conv"),
        ("drop_out = 0.1", "there is no key 'drop_out': did you mean dropout?"),
        ("[methods]\ndropout = 0.1", "there is no key 'methods': known are model, epochs"),
        ("dropout = ", "must be TOML: "),
        ("dropout = " + 30_000 * "[", "must be TOML: maximum recursion depth exceeded"),
        ("noise = 1" + 400 * "0", "noise must be finite and at least 0, got inf"),
        ("noise = 1" + 5000 * "0", "must be TOML: Exceeds the limit (4300 digits)"),
    ],
)
def test_what_a_recipe_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_toml(text)
    assert str(caught.value).startswith(f"Recipe: {message}")
    assert "\n" not in str(caught.value)
