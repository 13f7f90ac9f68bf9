"""The parts of serving that need no server: who is decoded when, what text grows, what stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from reference_decoder import CountingDecoder, ReferenceDecoder, alone
from serving import Bytes

from weft.errors import TargetError
from weft.inference.sampling import Sampling
from weft.runtime.pool import Pool
from weft.serving.decoder import Request
from weft.serving.driver import Leader, Order, drive, shared
from weft.serving.growth import Growth
from weft.serving.refusal import RefusedError
from weft.serving.scheduler import Facts, Scheduler, Ticket
from weft.serving.tokenizer import Numbers, tokenizer_of
from weft.target import Target

FACTS = Facts(vocabulary=256, max_length=256, capacity_tokens=100, devices=1)


class Silent:
    """A watcher that looks away."""

    def first_token(self, wait_s: float) -> None: ...

    def ended(self, tokens: int, prompt: int, decode_s: float) -> None: ...


def scheduler_of(**settings: Any) -> tuple[Scheduler, list[dict[str, Any]]]:
    sent: list[dict[str, Any]] = []
    scheduler = Scheduler(**{"max_queue": 4, "max_concurrent": 8, "watcher": Silent(), **settings})
    scheduler.up(FACTS, sent.append)
    return scheduler, sent


def submit(scheduler: Scheduler, prompt: int, new: int, **more: Any) -> Ticket:
    request = Request(id=scheduler.number(), prompt=(1,) * prompt, max_new_tokens=new, **more)
    return scheduler.submit(request)


def ids(sent: Sequence[dict[str, Any]], what: str) -> list[int]:
    return [x["id"] if what == "join" else x for message in sent for x in message.get(what, [])]


def outcome(ticket: Ticket) -> tuple[list[int], str | None]:
    """The tokens that are there, and how they ended."""

    async def read() -> tuple[list[int], str | None]:
        tokens = []
        try:
            async for token in ticket:
                tokens.append(token)
        except RefusedError as refusal:
            return tokens, refusal.message
        return tokens, ticket.end

    return asyncio.run(read())


def test_requests_join_as_far_as_the_cache_goes_and_none_overtakes():
    scheduler, sent = scheduler_of()
    first, second, third, small = (submit(scheduler, 20, new) for new in (20, 30, 40, 1))
    assert ids(sent, "join") == [first.request.id, second.request.id]
    assert (scheduler.slots_used, scheduler.running, scheduler.waiting) == (90, 2, 2)
    scheduler.withdraw(first)
    assert ids(sent, "leave") == [first.request.id]
    assert scheduler.running == 1
    scheduler.withdraw(second)
    assert ids(sent, "join")[2:] == [third.request.id, small.request.id]
    for ticket in (third, small, small):
        scheduler.withdraw(ticket)
    assert (scheduler.slots_used, scheduler.running, scheduler.waiting) == (0, 0, 0)


def test_no_more_are_decoded_at_once_than_may_be():
    scheduler, sent = scheduler_of(max_concurrent=2)
    tickets = [submit(scheduler, 1, 1) for _ in range(5)]
    assert ids(sent, "join") == [tickets[0].request.id, tickets[1].request.id]
    scheduler.received([[tickets[1].request.id, 7]])
    assert ids(sent, "join")[2:] == [tickets[2].request.id]


def test_a_full_queue_says_when_to_ask_again():
    scheduler, _ = scheduler_of(max_queue=2, max_concurrent=1)
    for _ in range(3):
        submit(scheduler, 1, 10)
    with pytest.raises(RefusedError, match="2 requests wait already") as raised:
        submit(scheduler, 1, 10)
    assert raised.value.status == 429
    assert raised.value.headers == {"Retry-After": "1"}


def test_a_request_ends_by_its_length_or_by_a_token():
    scheduler, _ = scheduler_of()
    long, short = submit(scheduler, 1, 3), submit(scheduler, 1, 3, stop_token_ids=frozenset({9}))
    scheduler.received([[long.request.id, 9], [short.request.id, 9], [99, 1]])
    scheduler.received([[long.request.id, 8]])
    scheduler.received([[long.request.id, 7], [short.request.id, 1]])
    assert outcome(long) == ([9, 8, 7], "length")
    assert outcome(short) == ([9], "stop")
    assert scheduler.slots_used == 0


def test_what_is_decoded_fails_with_the_workers_and_what_waits_does_not():
    scheduler, _ = scheduler_of(max_concurrent=1)
    lost, kept = submit(scheduler, 1, 5), submit(scheduler, 1, 1)
    scheduler.received([[lost.request.id, 3]])
    scheduler.down("rank 1 failed", waiting=False)
    assert outcome(lost) == ([3], "rank 1 failed")
    assert scheduler.slots_used == 0
    with pytest.raises(RefusedError, match="rank 1 failed") as raised:
        submit(scheduler, 1, 1)
    assert raised.value.status == 503
    sent: list[dict[str, Any]] = []
    scheduler.up(FACTS, sent.append)
    assert ids(sent, "join") == [kept.request.id]
    scheduler.received([[kept.request.id, 4]])
    assert outcome(kept) == ([4], "length")


def test_what_waits_fails_too_where_the_workers_do_not_come_back():
    scheduler, _ = scheduler_of(max_concurrent=1)
    submit(scheduler, 1, 5)
    waits = submit(scheduler, 1, 5)
    scheduler.down("rank 1 failed", waiting=False)
    scheduler.down("rank 1 failed again", waiting=True)
    assert outcome(waits) == ([], "rank 1 failed again")


def test_what_waits_and_no_longer_fits_fails():
    scheduler, _ = scheduler_of(max_concurrent=1)
    submit(scheduler, 1, 5)
    waits = submit(scheduler, 50, 20)
    scheduler.down("rank 1 failed", waiting=False)
    smaller = Facts(vocabulary=256, max_length=256, capacity_tokens=60, devices=1)
    scheduler.up(smaller, lambda message: None)
    assert "less room" in str(outcome(waits)[1])


class Script:
    """A channel that says what it was told to, a list of messages for each time it is asked."""

    def __init__(self, says: Sequence[list[dict[str, Any]] | None]) -> None:
        self.says, self.sent, self.waits = list(says), list[dict[str, Any]](), list[float]()

    def receive(self, timeout_s: float) -> list[dict[str, Any]] | None:
        self.waits.append(timeout_s)
        return self.says.pop(0) if self.says else None

    def send(self, message: dict[str, Any]) -> bool:
        self.sent.append(message)
        return True


def request(id: int, prompt: Sequence[int], new: int, **more: Any) -> Request:
    return Request(id=id, prompt=tuple(prompt), max_new_tokens=new, **more)


def test_a_request_crosses_as_json():
    one = request(
        3, [1, 2], 5, sampling=Sampling(do_sample=True, temperature=0.5, top_k=4, seed=9), stop_token_ids=frozenset({1})
    )
    assert Request.from_json(one.to_json()) == one


def test_rank_0_gives_orders():
    one, two = request(1, [5], 2), request(2, [6], 9, stop_token_ids=frozenset({7}))
    joins = {"join": [one.to_json(), two.to_json()]}
    gone = {"join": [request(3, [1], 1).to_json()]}, {"leave": [3, 77]}
    script = Script([[joins], [*gone], [], [], [{"stop": True}]])
    leader = Leader(script)
    assert leader.order() == Order(join=(one, two), step=True)
    leader.report({1: 6, 2: 7})
    assert leader.order() == Order(leave=(2,), step=True)
    leader.report({1: 7})
    assert leader.order() == Order(leave=(1,))
    assert leader.order() == Order()
    assert leader.order() == Order(stop=True)
    assert leader.order() == Order(stop=True)  # nobody there
    assert [wait > 1 for wait in script.waits] == [True, False, False, True, True, True]
    assert script.sent == [{"tokens": [(1, 6), (2, 7)]}, {"tokens": [(1, 7)]}]


def drive_here(says: Sequence[list[dict[str, Any]] | None]) -> Any:
    decoder, script = CountingDecoder(), Script(says)
    steps: list[dict[int, int]] = []
    step = decoder.step
    decoder.step = lambda: steps.append(step()) or steps[-1]
    drive(decoder, Leader(script) if dist.get_rank() == 0 else None)
    return steps, decoder.last, script.sent


def test_all_ranks_do_the_same(pool: Pool):
    one, two = request(1, [5], 3), request(2, [200], 2)
    says = [[{"join": [one.to_json()]}], [], [{"join": [two.to_json()]}], [], [{"leave": [2]}], [{"stop": True}]]
    found = pool.run(drive_here, says, ranks=3)
    assert found[0][0] == [{1: 6}, {1: 7}, {1: 8, 2: 201}, {2: 202}]
    assert [steps for steps, _, _ in found] == [found[0][0]] * 3
    assert [last for _, last, _ in found] == [{}] * 3
    assert [message["tokens"] for message in found[0][2]] == [list(step.items()) for step in found[0][0]]


def share_here(length: int) -> Order:
    order = Order(join=(request(1, range(length), 3),), leave=(7, 8), step=True) if dist.get_rank() == 0 else None
    return shared(order)


def test_orders_cross_whole(pool: Pool):
    found = pool.run(share_here, 10_000, ranks=2)
    assert found[0] == found[1]
    assert found[1].join[0].prompt == tuple(range(10_000))


def told(growth: Growth, tokens: Sequence[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(growth.add(token))
        if growth.stopped:
            return found
    return [*found, growth.finish()]


@given(st.text(max_size=30))
def test_text_grows_to_what_it_is(text: str):
    assert "".join(told(Growth(Bytes()), list(text.encode()))) == text


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_grow_too(text: bytes):
    assert all(isinstance(piece, str) for piece in told(Growth(Bytes()), list(text)))


def test_half_a_character_waits_for_the_other():
    assert told(Growth(Bytes()), list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]
    assert told(Growth(Bytes()), list("é".encode())[:1]) == ["", "\ufffd"]


def test_numbers_have_spaces_between():
    assert told(Growth(Numbers()), [1, 22, 3]) == ["1", " 22", " 3", ""]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]):
    growth = Growth(Bytes(), stops)
    pieces = told(growth, list(text.encode()))
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if not ends:
        assert not growth.stopped
        assert "".join(pieces) == text
        return
    seen = text[: ends[0]]  # as much as is there when the first one is whole
    assert growth.stopped
    assert "".join(pieces) == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_what_may_become_a_stop_string_waits():
    assert told(Growth(Bytes(), ["bcd"]), list(b"abcabcd")) == ["a", "", "", "bca", "", "", ""]


def test_a_target_may_bring_a_tokenizer(tmp_path: Any):
    (tmp_path / "with_tokenizer.py").write_text(
        "class T:\n"
        "    def __init__(self, shift): self.shift = shift\n"
        "    def encode(self, text): return [ord(c) + self.shift for c in text]\n"
        "    def decode(self, ids): return ''.join(chr(i - self.shift) for i in ids)\n"
        "    eos_token_id = 3\n"
        "def workload(shift: int = 0, layers: int = 1): ...\n"
        "def tokenizer(shift: int = 0): return T(shift)\n"
    )
    tokenizer = tokenizer_of(Target.parse(str(tmp_path / "with_tokenizer.py"), {"shift": "1", "layers": "2"}))
    assert tokenizer.encode("ab") == [98, 99]
    assert tokenizer.decode([98, 99]) == "ab"
    assert tokenizer.ends == {3}
    with pytest.raises(RefusedError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_a_target_may_have_none(tmp_path: Any):
    (tmp_path / "without_tokenizer.py").write_text("def workload(): ...\n")
    tokenizer = tokenizer_of(Target.parse(str(tmp_path / "without_tokenizer.py")))
    assert tokenizer.decode([1, 2]) == "1 2"
    for ask in (lambda: tokenizer.encode("x"), lambda: tokenizer.chat([])):
        with pytest.raises(RefusedError, match="no tokenizer"):
            ask()


def test_what_is_no_tokenizer_is_told(tmp_path: Any):
    (tmp_path / "odd_tokenizer.py").write_text("def workload(): ...\ndef tokenizer(): return 3\n")
    with pytest.raises(TargetError, match=r"tokenizer\(\) returned int, which has no encode\(\)"):
        tokenizer_of(Target.parse(str(tmp_path / "odd_tokenizer.py")))
    with pytest.raises(TargetError, match="name another with --tokenizer"):
        tokenizer_of(Target.parse(str(tmp_path / "odd_tokenizer.py")), tmp_path)


def test_a_directory_has_tokenizer_and_template(tmp_path: Any):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<end>", "<s>", "hello", "there", "user", "assistant"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<s>")
    made.save_pretrained(tmp_path)
    plain = tokenizer_of(Target.parse("any.py"), tmp_path)
    assert plain.encode("hello there") == [2, 3]
    assert plain.decode([2, 3, 0]) == "hello there"
    with pytest.raises(RefusedError, match="no chat template"):
        plain.chat([])
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    chatty = tokenizer_of(Target.parse(str(tmp_path)))
    assert chatty.chat([{"role": "user", "content": "hello"}]) == [4, 2, 5]
    assert chatty.ends == {0, 5}
    with pytest.raises(RefusedError, match="no system here"):
        chatty.chat([{"role": "system", "content": "x"}])


def test_the_reference_is_the_library_itself():
    import torch

    decoder = ReferenceDecoder()
    one = request(1, range(5, 25), 30)
    library = decoder.model.generate(
        torch.tensor([one.prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert alone(decoder, one) == library[0, 20:].tolist()
    decoder.join([one, request(2, [9], 30, sampling=Sampling(do_sample=True, seed=3))])
    together = [decoder.step()[1] for _ in range(30)]
    assert together == library[0, 20:].tolist()
