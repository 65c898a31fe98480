"""Nets in their forms against each other, in one setting: checked for equality, raced, and weighed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from framework.bench import equal
from framework.bench.harness import Candidate, Section, Timing, race, threads
from framework.bench.memory import peak, saved_bytes
from framework.bench.nets import Entrant, Form, Setting, Timm, formed, images_for, inputs, loss, step
from framework.bench.script import Script
from framework.compiled import forget
from framework.data.base import Image
from framework.errors import ConfigError

# Acts at batch 1 for each round, whose quantiles are the latency.
LATENCY = 5


@dataclass(frozen=True)
class Entry:
    """A net, and one of the forms in which it runs.

    Args:
        entrant: the net.
        form: how it is run.
        alone: whether in a process of its own, where nothing is set for it.
    """

    entrant: Entrant
    form: Form = field(default_factory=Form)
    alone: bool = False

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.entrant.name, self.form.name, self.alone * "in a script of its own")))


@dataclass
class Made:
    """The nets of entrants with as equal weights as can be.

    Attributes:
        nets: by the entrant's name; the first is what the others got their weights from.
        notes: why some could not get them.
        equal: the names of those that did, and must give the same logits.
    """

    nets: dict[str, nn.Module]
    notes: list[str]
    equal: set[str]


def make(entrants: Sequence[Entrant], strict: bool = False) -> Made:
    """Makes nets, and gives them the weights of the first.

    Args:
        entrants: the first has weights that the others can take: timm's, where there is one of timm's.
        strict: whether nets that cannot take the weights are refused, rather than told of.

    Raises:
        Unequal: with `strict`, a net cannot take them.
    """
    made = Made({}, [], set())
    for entrant in entrants:
        net = entrant.make()
        if not made.nets:
            equal.liven(net, images_for(entrant.image, Setting("training", "float32", 4, 1, "cpu")))
            made.equal.add(entrant.name)
        else:
            first, reference = next(iter(made.nets.items()))
            why = equal.share(reference, net)
            apart = "" if why or isinstance(entrants[0], Timm) else _apart(entrants[0], reference, entrant, net)
            if why and strict:
                raise equal.Unequal(f"{entrant.name} and {first} cannot have the same weights ({why}): not timed")
            if why:
                made.notes.append(f"{entrant.name} and {first} are different nets, each with weights of its own: {why}")
            elif apart:
                made.notes.append(apart)
            else:
                made.equal.add(entrant.name)
        made.nets[entrant.name] = net
    return made


def _apart(first: Entrant, reference: nn.Module, entrant: Entrant, net: nn.Module) -> str:
    """How two nets of ours with the same weights differ, which may be meant; empty where they do not."""
    at = Setting("inference", "float32", 2, 1, "cpu")
    found = equal.difference(logits_of(net, entrant.image, Form(), at), logits_of(reference, first.image, Form(), at))
    if found <= equal.TOLERANCE["float32"]:
        return ""
    return f"{entrant.name} and {first.name} have the same weights and are different nets: logits differ by {found:.2g}"


@contextmanager
def exact() -> Iterator[None]:
    """Without TF32 in convolutions, which torch uses on GPUs unless it is told not to."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = was


def logits_of(net: nn.Module, image: Image, form: Form, setting: Setting) -> Tensor:
    """What a net gives at inference in a form; the net is left as it was."""
    at = replace(setting, mode="inference")
    return step(formed(deepcopy(net), form, at), form, at, image)().float()


def compare(
    entries: Sequence[Entry],
    made: Made,
    setting: Setting,
    rounds: int,
    title: str = "",
    weigh: bool = True,
    place: str = "",
) -> Section:
    """Races entries in one setting.

    Args:
        entries: the first is what the others are compared with.
        made: the nets of their entrants.
        setting: how.
        rounds: of the race.
        title: of the table, before the setting.
        weigh: whether to measure memory too.
        place: which table of how many it is, to be told.

    Raises:
        Unequal: nets with the same weights give different logits.
        ConfigError: there is too little memory.
    """
    forget()  # what was compiled for another batch or number of threads
    torch.backends.cudnn.benchmark = True
    heading, part = ": ".join(filter(None, (title, setting.title))), f"batch {setting.batch}"
    what = ": ".join(filter(None, (place, f"{heading}, {part}")))
    with threads(setting.threads), telling(what) as say, enough_memory(setting), ExitStack() as stack:
        name, first = next(iter(made.nets.items()))
        few = replace(setting, dtype="float32", batch=setting.batch if setting.mode == "inference" else 2)
        with exact():
            reference = logits_of(first, entries[0].entrant.image, Form(), few)
        candidates = []
        for entry in entries:
            say(entry.name)
            candidates.append(_candidate(entry, made, (name, reference), setting, stack))
        for entry, candidate in zip(entries, candidates, strict=True):
            if weigh and not entry.alone:
                say(f"{entry.name}: memory")
                candidate.extra.update(weight(entry, made, setting))
        say(f"{rounds} rounds")
        timings = race(candidates, setting.stopwatch, rounds)
    for timing, entry in zip(timings, entries, strict=True):
        macs = entry.entrant.cost()[1] * (3 if setting.mode == "training" else 1)  # its backward takes two forwards
        timing.extra = {"GMAC/s": timing.images_per_s * macs / 1e9, **timing.extra}
    return Section(heading, setting.clock, timings, list(made.notes), asdict(setting), part)


def _candidate(entry: Entry, made: Made, truth: tuple[str, Tensor], setting: Setting, stack: ExitStack) -> Candidate:
    """An entry as a candidate: with the weights of `made`, its logits compared with those of `truth`."""
    entrant, form = entry.entrant, entry.form
    name, reference = truth
    if entry.alone:
        script = stack.enter_context(closing(Script(entrant, form, setting)))
        timed, act = script, script.last
    else:
        timed = None
        act = step(formed(deepcopy(made.nets[entrant.name]), form, setting), form, setting, entrant.image)
    candidate = Candidate(entry.name, act, setting.batch, {}, timed, isinstance(entrant, Timm))
    if entrant.name not in made.equal:
        return candidate
    with exact():
        if setting.mode == "inference":
            logits = act().float()
        else:  # uncompiled: inference would be compiled besides
            few = replace(setting, batch=len(reference))
            logits = logits_of(made.nets[entrant.name], entrant.image, replace(form, compile=False), few)
    apart = equal.check(entry.name, logits, f"{name} in float32", reference, setting.dtype)
    return replace(candidate, extra={"Δ logits": apart} if len(made.nets) > 1 else {})


def weight(entry: Entry, made: Made, setting: Setting) -> dict[str, float]:
    """Memory of a step, in MiB: what the forward saves for each image, and the peak.

    On the CPU the peak is taken in a fresh process, and not of compiled nets, which it would compile once more.
    """
    entrant, form = entry.entrant, entry.form
    found: dict[str, float] = {}
    if setting.mode == "training":
        net = formed(deepcopy(made.nets[entrant.name]), form, setting)
        images = inputs(images_for(entrant.image, setting), form)
        found["saved MiB/image"] = saved_bytes(loss(net, images, form, setting), net) / setting.batch / 2**20
    if not form.compile or setting.device == "cuda":
        most = peak(entrant, form, setting)
        if most is not None:
            found["peak MiB"] = most / 2**20
    return found


def latency(entries: Sequence[Entry], made: Made, setting: Setting, rounds: int) -> list[Timing]:
    """Every single inference of one image timed, so that quantiles over them are the latency."""
    forget()
    alone = replace(setting, mode="inference", batch=1)
    with threads(setting.threads), telling(f"latency: {alone.title}") as say:
        candidates = []
        for entry in entries:
            say(entry.name)
            net = formed(deepcopy(made.nets[entry.entrant.name]), entry.form, alone)
            candidates.append(Candidate(entry.name, step(net, entry.form, alone, entry.entrant.image), 1))
        count = LATENCY * rounds
        say(f"{count} rounds")
        return race(candidates, alone.stopwatch, count, least=0)


@contextmanager
def enough_memory(setting: Setting) -> Iterator[None]:
    """Where memory does not suffice, what to change is said in one line."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate" not in str(error):
            raise
        raise ConfigError(f"--batch {setting.batch}: out of memory; give a smaller batch") from error


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """Gives what tells of each part of `what`: in a terminal on one line that is replaced, elsewhere not at all.

    There `what` is told of once, on a line of its own.
    """
    lively = sys.stderr.isatty()

    def say(part: str) -> None:
        if lively:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\033[K{f'{part} ({what})'[:width]}")
            sys.stderr.flush()

    if not lively:
        print(what, file=sys.stderr, flush=True)
    try:
        yield say
    finally:
        if lively:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
