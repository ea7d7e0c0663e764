"""Grammars with real vocabularies: masks against oracles, answers against validators, and hostile input."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import llguidance
import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.errors import ConstraintError, UnknownModelError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_files import find_model
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import FinishReason, Request, StructuredOutput, StructureKind
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.text.grammar.compiler import Grammar, GrammarCompiler
from albireo_jax.text.grammar.notation import MAX_TEXT_BYTES
from albireo_jax.text.tokenizer import Tokenizer
from tests.labs.grammar_lab import Walker, draw_schema, linked, token_ids

PADDING = 77
CHOICES = ("yes", "yesterday", "no", "naïve 東京", "a\nb\\n", '"quoted"', " spaced", "</s>")


class Vocabulary:
    """A tokenizer, the compiler for a model that pads its vocabulary, and a walker."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size + PADDING
        self.eos = tokenizer.eos_token_ids
        self.compiler = GrammarCompiler(tokenizer, vocab_size=self.size, eos_token_ids=self.eos)
        self.walker = Walker(tokenizer, eos_token_ids=self.eos, vocab_size=self.size)

    def compile(self, kind: StructureKind, text: str = "", choices: tuple[str, ...] = ()):
        return self.compiler.compile(StructuredOutput(kind=kind, text=text, choices=choices))


@pytest.fixture(scope="module")
def smollm2() -> Vocabulary:
    """Byte-level pieces, rebuilt from a GGUF file."""
    try:
        return Vocabulary(Tokenizer.from_files(find_model("smollm2")))
    except UnknownModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Vocabulary:
    """SentencePiece with bytes for what it does not know, from a tokenizer.json."""
    return Vocabulary(Tokenizer.from_files(find_model(str(data_dir / "models" / "stories260k"))))


@pytest.fixture(scope="module", params=["smollm2", "stories"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return request.getfixturevalue(request.param)


def test_a_choice_allows_the_tokens_that_a_look_through_the_vocabulary_finds(vocabulary: Vocabulary) -> None:
    """At each prefix of each choice, every token is tried: its bytes must go on to some choice."""
    grammar = vocabulary.compile(StructureKind.CHOICE, choices=CHOICES)
    targets = [choice.encode() for choice in CHOICES]
    pieces = vocabulary.tokenizer.token_bytes(skip_special_tokens=True)
    of_bytes: dict[bytes, list[int]] = {}
    for token_id in range(vocabulary.size):
        of_bytes.setdefault(pieces[token_id], []).append(token_id)
    seen: set[bytes] = set()
    for target in targets:
        constraint, prefix = grammar.constraint(), b""
        while True:
            allowed = set(token_ids(constraint.mask()).tolist())
            assert set(vocabulary.eos) & allowed == (set(vocabulary.eos) if prefix in targets else set())
            rests = {t[len(prefix) :] for t in targets if t.startswith(prefix) and t != prefix}
            fitting = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)} & of_bytes.keys()
            assert {pieces[token_id] for token_id in allowed - set(vocabulary.eos)} == fitting
            seen |= fitting
            if prefix == target:
                break
            piece = max((p for p in fitting if target.startswith(prefix + p)), key=len)
            constraint.advance(next(t for t in of_bytes[piece] if t in allowed))
            prefix += piece
    assert len(seen) > 20


@pytest.mark.parametrize("part", range(4))
def test_answers_to_random_schemas_are_json_that_a_validator_accepts(smollm2: Vocabulary, part: int) -> None:
    for seed in range(50 * part, 50 * part + 50):
        random = np.random.default_rng(seed)
        schema = draw_schema(random)
        schema = linked(schema) if seed % 10 == 0 else schema
        grammar = smollm2.compile(StructureKind.JSON_SCHEMA, json.dumps(schema))
        answer = smollm2.walker.answer(grammar.constraint(), random)
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


@pytest.mark.parametrize("seed", range(4))
def test_a_sentencepiece_vocabulary_gives_json_too(stories: Vocabulary, seed: int) -> None:
    random = np.random.default_rng(seed)
    schema = {"type": "object", "properties": {"é": draw_schema(random, depth=1)}, "required": ["é"]}
    grammar = stories.compile(StructureKind.JSON_SCHEMA, json.dumps(schema))
    answer = json.loads(stories.walker.answer(grammar.constraint(), random))
    jsonschema.Draft202012Validator(schema).validate(answer)


def test_json_mode_gives_objects(smollm2: Vocabulary) -> None:
    grammar = smollm2.compile(StructureKind.JSON_OBJECT)
    answers = [smollm2.walker.answer(grammar.constraint(), np.random.default_rng(n)) for n in range(10)]
    assert all(isinstance(json.loads(answer), dict) for answer in answers)
    assert len(set(answers)) > 5


@pytest.mark.parametrize(
    "pattern",
    [r"\d{3}-\d{4}", r"(foo|bar)+ [^a-y]?", r"[A-Z][a-z]{2,6}(, [A-Z][a-z]{0,9}){1,3}\.", r"/\w+\n?"],
)
def test_an_expression_is_matched_from_end_to_end(vocabulary: Vocabulary, pattern: str) -> None:
    grammar = vocabulary.compile(StructureKind.REGEX, pattern)
    for seed in range(5):
        answer = vocabulary.walker.answer(grammar.constraint(), np.random.default_rng(seed)).decode()
        assert re.fullmatch(pattern, answer), answer


def test_a_lark_grammar_is_followed(vocabulary: Vocabulary) -> None:
    text = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,3}/'
    grammar = vocabulary.compile(StructureKind.GRAMMAR, text)
    for seed in range(10):
        answer = vocabulary.walker.answer(grammar.constraint(), np.random.default_rng(seed)).decode()
        assert re.fullmatch(r"[0-9+()]+", answer)
        assert isinstance(eval(answer, {"__builtins__": {}}), int)


def test_neither_padding_nor_special_tokens_are_ever_allowed_but_to_end(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.compile(StructureKind.REGEX, r"(.|\n){0,400}")
    shown = vocabulary.tokenizer.token_bytes(skip_special_tokens=True)
    ordinary = {token_id for token_id in range(vocabulary.size) if shown[token_id]}
    constraint = grammar.constraint()
    random, data = np.random.default_rng(0), b""
    for _ in range(20):
        allowed = set(token_ids(constraint.mask()).tolist())
        is_text = data.decode("utf-8", "replace").encode() == data  # no end in the middle of a character
        assert allowed - ordinary == (set(vocabulary.eos) if is_text else set())
        token_id = int(random.choice(sorted(allowed & ordinary)))
        constraint.advance(token_id)
        data += shown[token_id]


def test_a_grammar_may_name_special_tokens(smollm2: Vocabulary) -> None:
    special = smollm2.tokenizer.token_id("<|im_start|>")
    constraint = smollm2.compile(StructureKind.GRAMMAR, f'start: "a" <[{special}]> "b"').constraint()
    (letter,) = token_ids(constraint.mask())
    constraint.advance(int(letter))
    assert token_ids(constraint.mask()).tolist() == [special]


def test_only_the_end_may_follow_what_is_complete(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.compile(StructureKind.CHOICE, choices=("a",))
    ending, endless = grammar.constraint(), grammar.constraint(ignore_eos=True)
    for constraint in (ending, endless):
        constraint.advance(int(token_ids(constraint.mask())[0]))
    assert set(token_ids(ending.mask()).tolist()) == set(vocabulary.eos)
    assert not endless.mask().any()


def test_constraints_of_one_grammar_do_not_touch_each_other(smollm2: Vocabulary) -> None:
    grammar = smollm2.compile(StructureKind.CHOICE, choices=("ab", "xy"))
    one, other = grammar.constraint(), grammar.constraint()
    before = other.mask()
    one.advance(int(token_ids(one.mask())[0]))
    one.mask()[:] = 0
    assert np.array_equal(other.mask(), before)
    assert np.array_equal(grammar.constraint().mask(), before)


def test_a_grammar_is_compiled_once_and_from_many_threads(smollm2: Vocabulary) -> None:
    structured = StructuredOutput(kind=StructureKind.REGEX, text="[a-f]{7}")
    with ThreadPoolExecutor(4) as pool:
        grammars = list(pool.map(smollm2.compiler.compile, [structured] * 8))
    assert smollm2.compiler.compile(structured) is smollm2.compiler.compile(structured)
    masks = [grammar.constraint().mask() for grammar in grammars]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


def test_white_space_comes_to_an_end(smollm2: Vocabulary) -> None:
    constraint = smollm2.compile(StructureKind.JSON_OBJECT).constraint()
    for text in ("{", *[" "] * 64):
        constraint.advance(int(smollm2.tokenizer.encode(text)[0]))
    pieces = smollm2.tokenizer.token_bytes()
    assert all(pieces[token_id].strip() for token_id in token_ids(constraint.mask()).tolist())


def _chain(count: int) -> str:
    rules = "\n".join(f'r{i}: r{i + 1} "x"' for i in range(count))
    return f'start: r0\n{rules}\nr{count}: "y"'


_SCHEMA, _REGEX, _LARK = StructureKind.JSON_SCHEMA, StructureKind.REGEX, StructureKind.GRAMMAR
_BAD = {
    "schema cut off": (_SCHEMA, '{"type": "obj', "not JSON"),
    "schema of a number": (_SCHEMA, "3", "an object is expected, got '3'"),
    "schema of brackets": (_SCHEMA, "[" * 100_000, "nested too deeply"),
    "schema nested": (_SCHEMA, '{"items":' * 2000 + "{}" + "}" * 2000, "recursion limit|nested too deeply"),
    "unknown type": (_SCHEMA, '{"type": "thing"}', "Invalid type: thing"),
    "lost reference": (_SCHEMA, '{"$ref": "#/$defs/x"}', "'/\\$defs/x' does not exist"),
    "remote reference": (_SCHEMA, '{"$ref": "https://example.com/s"}', "JSON schema"),
    "reference to itself": (_SCHEMA, '{"$ref": "#"}', "no token can follow"),
    "not": (_SCHEMA, '{"not": {"type": "string"}}', "Unimplemented keys"),
    "empty range": (_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}', "5.* is greater than .*3"),
    "look-ahead in a pattern": (_SCHEMA, '{"type": "string", "pattern": "(?=a)"}', "look-around"),
    "half a pair": (_SCHEMA, '{"const": "\\ud800"}', "hex escape|surrogate"),
    "not a number": (_SCHEMA, '{"const": NaN}', "expected value"),
    "cross product": (
        _SCHEMA,
        json.dumps({"allOf": [{"anyOf": [{"required": [f"{x}{i}"]} for x in "ab"]} for i in range(20)]}),
        "too large|too complex|Unimplemented|No such",
    ),
    "intersection": (
        _SCHEMA,
        json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}),
        "too complex",
    ),
    "2,000 optional properties": (
        _SCHEMA,
        json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}),
        "items",
    ),
    "references in a chain": (
        _SCHEMA,
        json.dumps(
            {
                "$ref": "#/$defs/0",
                "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)} | {"3000": {}},
            }
        ),
        "too complex",
    ),
    "too long": (_REGEX, "a" * (MAX_TEXT_BYTES + 1), f"the limit is {MAX_TEXT_BYTES}"),
    "no expression": (_REGEX, "", "empty"),
    "open group": (_REGEX, "(a", "unclosed group"),
    "look-ahead": (_REGEX, "(?=a)b", "look-around"),
    "back-reference": (_REGEX, r"(a)\1", "backreferences"),
    "5,000 groups": (_REGEX, "(" * 5000 + "a" + ")" * 5000, "invalid regex"),
    "stars": (_REGEX, "a" + "*" * 5000, "invalid regex"),
    "a*a*a*": (_REGEX, "a*" * 3000, "lexer"),
    "classes": (_REGEX, r"(\p{L}{1,500}\p{N}*){1,500}", "too many expressions"),
    "surrogate": (_REGEX, "a\ud800", "half a surrogate pair at 1"),
    "no grammar": (_LARK, " \n", "empty"),
    "no start": (_LARK, 'x: "a"', "no start rule"),
    "no such rule": (_LARK, 'start: "a"\n  | foo', 'unknown name: "foo"'),
    "no end": (_LARK, "start: start", "no token can follow"),
    "open string": (_LARK, 'start: "a\nb', "lexer error"),
    "rules in a chain": (_LARK, _chain(3000), "too complex"),
    "parentheses": (_LARK, "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
    "alternatives": (_LARK, "start: " + " | ".join(['"a"'] * 5000), "items"),
    "repetitions": (_LARK, 'start: a{0,999}\na: b{0,999}\nb: c{0,999}\nc: "x"?', "items"),
    "conjunction": (_LARK, "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(2000)), "too complex"),
    "token out of range": (_LARK, "start: <[9999999]>", "too large"),
}


@pytest.mark.parametrize("name", _BAD)
def test_what_is_malformed_or_hostile_is_refused_in_bounded_time(smollm2: Vocabulary, name: str) -> None:
    kind, text, message = _BAD[name]
    smollm2.compile(StructureKind.REGEX, "[ab]+")  # what must be set up is
    begin_s = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        smollm2.compile(kind, text)
    assert time.perf_counter() - begin_s < 10.0
    assert len(str(caught.value)) < 700
    begin_s = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        smollm2.compile(kind, text)
    assert time.perf_counter() - begin_s < 0.5
    fresh = smollm2.compile(StructureKind.REGEX, f"[ab]+{list(_BAD).index(name)}")
    assert len(token_ids(fresh.constraint().mask()))


@pytest.mark.parametrize("choices", [(), ("a", "")])
def test_choices_are_texts(smollm2: Vocabulary, choices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choices: at least one is needed and none may be empty"):
        smollm2.compile(StructureKind.CHOICE, choices=choices)


def test_an_answer_that_becomes_too_complex_raises(smollm2: Vocabulary) -> None:
    """Its rows grow with each token, and the matcher may hold 30 items in one."""
    smollm2.compile(StructureKind.JSON_OBJECT)
    workshop = smollm2.compiler._workshop
    assert workshop is not None
    lark = '%llguidance {"no_forcing": true}\nstart: a start b | "a"\na: "a"?\nb: "a"?'
    text = json.dumps({"grammars": [{"lark_grammar": lark}]})
    limits = llguidance.LLParserLimits(max_items_in_row=30)
    matcher = llguidance.LLMatcher(workshop.trie, text, log_level=0, limits=limits)
    constraint = Grammar(matcher, known=workshop.known, eos=workshop.eos).constraint()
    token_id = smollm2.tokenizer.encode("a")[0]

    def follow() -> None:
        for _ in range(100):
            constraint.mask()
            constraint.advance(token_id)

    with pytest.raises(ConstraintError, match=r"the grammar cannot be followed: .*items"):
        follow()


def test_constrained_requests_run_on_the_simulated_engine(smollm2: Vocabulary) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "maximum": 99}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    grammar = smollm2.compile(
        StructureKind.JSON_SCHEMA, json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
    )
    limits = EngineLimits(max_model_len=256, vocab_size=smollm2.size, num_pages=64, page_size=16)
    clock = Clock()
    executor = SimExecutor(limits, max_rows=8, cost=lambda _: 1.0, clock=clock)
    scheduler = Scheduler(SchedulerConfig(max_rows=8, max_step_tokens=64), limits)
    loop = EngineLoop(scheduler, executor, depth=2, timeline=Timeline(clock=clock))
    for seed in range(6):
        scheduler.add(
            Request(
                request_id=str(seed),
                prompt_token_ids=(5, 6, 7),
                max_tokens=120,
                sampling=TokenSampling(temperature=1.0, seed=seed),
                stop_ids=smollm2.eos,
            ),
            grammar.constraint(),
        )
    answers: dict[str, list[int]] = {}
    reasons: list[FinishReason] = []
    for _ in range(500):
        for output in loop.step() if loop.has_work else ():
            answers.setdefault(output.request_id, []).append(output.token_id)
            reasons += [output.finish_reason] if output.finish_reason else []
    assert reasons == [FinishReason.STOP] * 6
    for token_list in answers.values():
        jsonschema.validate(json.loads(smollm2.tokenizer.decode(token_list)), schema)


def test_a_trial_process_that_died_is_started_anew(smollm2: Vocabulary) -> None:
    smollm2.compile(StructureKind.REGEX, "before")
    workshop = smollm2.compiler._workshop
    assert workshop is not None
    process = workshop.trial._process
    assert process is not None
    process.kill()
    process.wait()
    smollm2.compile(StructureKind.REGEX, "after")
    assert workshop.trial._process is not process
