import pytest

from realsr_hpc.config.arguments import (
    read_arguments,
    read_count,
    read_flag,
    read_number,
    read_shard,
    read_with_overrides,
    take_switch,
)

VALID = {"input": None, "output": None, "overlap": "8"}


def test_given_values_stand_before_defaults():
    assert read_arguments(["input=a=b"], VALID, "how to") == {"input": "a=b", "output": None, "overlap": "8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ouput=x"], "did you mean 'output'.*valid keys: input, output, overlap"),
        (["input"], "argument 'input': write key=value"),
        (["--ouput=x"], "argument '--ouput=x': write key=value; did you mean 'output'"),
        (["input="], "key 'input' is empty"),
        (["input=a", "input=b"], "given twice: 'a' and 'b'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_arguments(arguments, VALID, "how to")


def test_a_home_folder_is_filled_in_also_in_a_list(monkeypatch):
    monkeypatch.setenv("HOME", "/home/us")
    given = read_arguments(["input=~/a b,c/~d,~", "output=x~"], VALID, "how to")
    assert (given["input"], given["output"]) == ("/home/us/a b,c/~d,/home/us", "x~")


def test_help_is_printed_whatever_else_is_given(capsys):
    with pytest.raises(SystemExit) as end:
        read_arguments(["nonsense", "--help"], VALID, "how to")
    assert end.value.code == 0 and capsys.readouterr().out == "how to\n"


def test_what_is_no_key_overrides_the_recipe():
    given = ["recipe=a", "input=x", "seed=1", "grpo.num_steps=2"]
    values, overrides = read_with_overrides(given, VALID, "how to")
    assert values["input"] == "x" and overrides == ["recipe=a", "seed=1", "grpo.num_steps=2"]
    with pytest.raises(ValueError, match="unknown key 'recipe'"):
        read_with_overrides(given, VALID, "how to", sections_only=True)
    with pytest.raises(SystemExit):
        read_with_overrides(["--help", *given], VALID, "how to")


def test_counts():
    assert read_count(read_arguments([], VALID, "how to"), "overlap") == 8
    with pytest.raises(ValueError, match="output=N is needed"):
        read_count({"output": None}, "output")
    with pytest.raises(ValueError, match="not a whole number"):
        read_count({"overlap": "many"}, "overlap")
    with pytest.raises(ValueError, match="below 1"):
        read_count({"overlap": "0"}, "overlap", minimum=1)


def test_switches_flags_numbers_and_shards():
    assert take_switch(["a=1", "-m"], "-m", "--multirun") == (True, ["a=1"]) and not take_switch(["a=1"], "-m")[0]
    assert [read_flag({"x": word}, "x") for word in ("true", "Yes", "1", "no")] == [True, True, True, False]
    assert read_number({"x": ".5"}, "x", "") == 0.5 and read_shard({"shard": "2/3"}) == (2, 3)
    with pytest.raises(ValueError, match="x='perhaps' is neither true nor false"):
        read_flag({"x": "perhaps"}, "x")
    with pytest.raises(ValueError, match="x='half' is not a number; give 0.5"):
        read_number({"x": "half"}, "x", "give 0.5")
    for shard in ("3", "0/2", "3/2"):
        with pytest.raises(ValueError, match=f"shard='{shard}': give k/n"):
            read_shard({"shard": shard})


def test_a_deleted_group_is_an_override():
    assert read_with_overrides(["~model"], VALID, "how to")[1] == ["~model"]


@pytest.mark.parametrize("key", ["ouput", "+ouput", "grpo_", "sed", "hydra/launcher"])
def test_a_bare_key_that_neither_tool_nor_recipe_has_is_refused_with_the_keys_of_both(key):
    with pytest.raises(ValueError, match="unknown key .* valid keys: input, output, overlap; of the recipe: .*, seed,"):
        read_with_overrides([f"{key}=x", "recipe=a"], VALID, "how to")
    with pytest.raises(ValueError, match="did you mean 'output'"):
        read_with_overrides(["ouput=x"], VALID, "how to")


def test_overrides_that_stages_and_hydra_read_stay_theirs():
    words = ["eval:num_images=4", "+cluster=slurm", "~cluster", "profile=quick", "grop.kl_beta=0"]
    assert read_with_overrides(words, VALID, "how to")[1] == words
