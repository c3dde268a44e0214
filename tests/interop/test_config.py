"""The strict reader: every key is read, known to be inert, or refused."""

import pytest

from rope_jax.interop.config import Config, did_you_mean, read_json


def test_unread_keys_are_refused_unless_null_inert_or_constant():
    values = dict(factor=2.0, dropout=0.1, bias=False, old=None)

    def config(**more):
        config = Config(values | more, "config of 'x'", {"base": 1e4})
        assert config["factor"] == 2.0 and config["base"] == 1e4
        return config

    rules = dict(constants={"bias": (False,)}, inert=lambda key: key == "dropout")
    config().refuse_unread(**rules)
    for more, message in (
        (dict(factr=3.0), "config of 'x' has an unknown key 'factr' = 3.0; did you mean 'factor'?"),
        (dict(odd=3.0), "unknown key 'odd' = 3.0; remove the key if it does not change the computation"),
        (dict(bias=True), "config of 'x': bias must be False, got True"),
        (dict(bias=None), "bias must be False, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**more).refuse_unread(**rules)
    ignored = config(odd=3.0)
    ignored.ignore("odd")
    ignored.refuse_unread(**rules)


def test_null_counts_as_missing_except_for_required_keys():
    config = Config(dict(null=None), "config", {"null": 3})
    assert config["null"] is None and config.get("null", 5) == 5 and config.is_null("null")
    assert not config.is_null("missing") and config.number("missing", None) is None
    for read in (config.need, config.__getitem__, config.number):
        with pytest.raises(ValueError, match="config must have the key 'nul'; did you mean 'null'?"):
            read("nul")
    assert config.resembles_missing("missingg") and not config.resembles_missing("other")


def test_a_file_must_hold_an_object(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (("{", "config.json must be JSON"), ("[]", "must hold a JSON object, got list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(file)


def test_hints_name_slips_of_one_letter():
    def hint(name, *candidates):
        return did_you_mean(name, candidates).removeprefix("; did you mean ").rstrip("?").strip("'")

    for slip, meant in (
        ("factr", "factor"),
        ("beta_fats", "beta_fast"),
        ("rope_theda", "rope_theta"),
        ("head_dimm", "head_dim"),
        ("nul", "null"),
        ("llama-3", "llama3"),
        ("lama", "llama"),
    ):
        assert hint(slip, meant) == meant
    for other, known in (
        ("exaone", "exaone4"),
        ("glm4v", "glm4"),
        ("minimax_m3", "minimax_m2"),
        ("mimo", "mimi"),
        ("partial_rotary_factors", "partial_rotary_factor"),
        ("attn_factor", "attention_factor"),
        ("beta", "theta"),
        ("same", "same"),
        ("", "a"),
    ):
        assert hint(other, known) == ""


def test_numbers_that_are_none():
    nan, inf = float("nan"), float("inf")
    config = Config(dict(nan=nan, inf=inf, yes=True, text="1", big=2.0**40, one=1.0), "config")
    for key in ("nan", "inf", "yes", "text"):
        for read in (config.number, config.positive, lambda key: config.integer(key, config[key]), config.size):
            with pytest.raises(ValueError, match=f"config: {key} must be"):
                read(key)
    assert config.agreed("nan") is nan and config.integer("one", 1.0) == 1
    with pytest.raises(ValueError, match="config: big must be at most 2,147,483,647, got 1,099,511,627,776"):
        config.integer("big", config["big"])
    with pytest.raises(ValueError, match="config: one must be true or false, got 1.0"):
        config.flag("one", False)
