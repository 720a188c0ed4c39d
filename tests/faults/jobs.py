"""The commands that faults befall: small models, small data, and what each of them leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from preload import parent
from preloaded import Command

SAMPLER = "--gen-length 8 --block-length 4 --steps 4"
MLP = "--network mlp --width 8 -b 4 --log-every 4 --first-checkpoint 10 --checkpoints 3"


@dataclass(frozen=True)
class Job:
    """A command; KIT in its line is the directory of inputs, all that it makes is under out/."""

    name: str
    line: str
    source: str = ""
    """File of the kit that is its standard input; none is /dev/null."""
    output: str = ""
    """FILE of -o, of a stage that writes records there or to standard output."""
    again: str = ""
    """What the same command is given to go on."""
    run: str = ""
    """Directory of the run, of a trainer."""
    steps: tuple[str, ...] = ("step",)
    """Fields that number the records of its metrics.jsonl."""
    streams: bool = True
    """Whether standard output has records where there is no -o."""
    newest: bool = False
    """Whether the newest checkpoint alone counts: which older ones stay depends on the fault."""

    def command(self, kit: Path, again: bool = False, streamed: bool = False) -> str:
        """The line to run; `streamed` has its records on standard output."""
        line = self.line
        if self.output and not streamed:
            line += f" -o {self.output}"
        if again and not streamed:
            line += f" {self.again}"
        return line.replace("KIT", str(kit))


JOBS = {
    job.name: job
    for job in (
        Job("rollout", f"rollout -q -m KIT/model -n 2 -b 4 {SAMPLER}", "prompts.jsonl",
            "out/made.jsonl", "--resume"),
        Job("verify", "verify -q", "many.jsonl", "out/made.jsonl", "--resume"),
        Job("score-elbo", "score-elbo -q -m KIT/model -k 2 -b 4", "verified.jsonl",
            "out/made.jsonl", "--resume"),
        Job("advantage", "advantage -q", "rewarded.jsonl", "out/made.jsonl", "--resume"),
        Job("update-rspo", "update -q --algo rspo --inner 1 -m KIT/model --prompts-per-step 2 "
            "-k 2 --lr 1e-3 --save-every 2 -o out/run", "verified.jsonl", again="--resume",
            run="out/run", newest=True),
        Job("update-sft", "update -q --algo sft -m KIT/model --prompts-per-step 4 --lr 1e-3 "
            "--save-every 3 -o out/run", "verified.jsonl", again="--resume",
            run="out/run", newest=True),
        Job("sae-train", "sae-train -q KIT/verified.jsonl -m KIT/model --layers 0,1 -k 2,4 "
            "--latents 32 --tokens 1024 --sae-batch-size 64 --buffer 16K -b 8 --log-every 4 "
            "--save-minutes 0.005 -o out/saes", run="out/saes", steps=("layer", "k", "step")),
        Job("distill-teacher", f"distill teacher builtin:digits#0:16 {MLP} -q --steps 24 "
            "--save-minutes 0.005 -o out/run", run="out/run"),
        Job("distill-cd", "distill cd builtin:digits#0:16 --teacher KIT/teacher -b 4 -q "
            "--log-every 4 --first-checkpoint 10 --checkpoints 3 --steps 16 --save-minutes 0.005 "
            "-o out/run", run="out/run"),
        Job("distill-masked", "distill masked -q -m KIT/model --records-per-step 4 --rounds 2 "
            "--steps-per-round 4 --lr 1e-3 -o out/run", "verified.jsonl", again="--resume",
            run="out/run", newest=True),
        Job("memo-samples", "memo-eval samples -q --samples KIT/samples.safetensors --train "
            "builtin:digits#0:16 --heldout builtin:digits#16:32 --bootstrap 20 -k 2 "
            "--rows out/rows.jsonl --gallery out/gallery.png --gallery-rows 2", "",
            "out/made.jsonl"),
        Job("memo-text", "memo-eval text -m KIT/model --steps 1,2 --orders 2 "
            "--rows out/rows.jsonl", "verified.jsonl"),
        Job("prompts", "prompts countdown -n 400", "", "out/made.jsonl"),
        Job("stats", "stats --by id", "many.jsonl", "out/made.jsonl"),
        Job("plot", "plot KIT/teacher/metrics.jsonl -y loss -o out/curves.png", streams=False),
        Job("init", "init out/model --hidden-size 16 --layers 2 --heads 2", streams=False),
    )
}  # fmt: skip


def start(line: str, directory: Path, source: Path | int | None, output: int | Path,
          errors: Path) -> Command:  # fmt: skip
    """Begin a command; the caller closes the descriptors that it gave."""
    given = os.open(source or os.devnull, os.O_RDONLY) if not isinstance(source, int) else source
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    writes = os.open(output, flags, 0o666) if isinstance(output, Path) else output
    said = os.open(errors, flags, 0o666)
    command = Command(parent(), line.split(), [given, writes, said], directory)
    for number, mine in ((given, given != source), (writes, writes != output), (said, True)):
        if mine:
            os.close(number)
    return command


def make_kit(kit: Path) -> None:
    """The inputs of all jobs."""
    kit.mkdir(parents=True)
    for line, source, output in (
        ("init model --hidden-size 16 --layers 2 --heads 2 --gen-length 8", "", ""),
        ("prompts countdown -n 12", "", "prompts.jsonl"),
        (f"rollout -q -m model -n 2 {SAMPLER}", "prompts.jsonl", "sampled.jsonl"),
        ("verify -q", "sampled.jsonl", "verified.jsonl"),
        (f"distill teacher builtin:digits#0:16 {MLP} -q --steps 24 -o teacher", "", ""),
        ("distill sample teacher -n 12 --steps 4 -o samples.safetensors", "", ""),
    ):
        code = start(line, kit, kit / source if source else None, kit / (output or "said"),
                     kit / "errors").wait()  # fmt: skip
        assert code == 0, f"{line}: {(kit / 'errors').read_text()}"
    # Rewards that differ, so that there is something to learn.
    import orjson

    rows = [orjson.loads(line) for line in (kit / "verified.jsonl").read_bytes().splitlines()]
    for number, row in enumerate(rows):
        row["reward"] = float(number % 2)
    whole = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    (kit / "verified.jsonl").write_bytes(whole)
    for name, copies in (("many.jsonl", 12), ("rewarded.jsonl", 24)):
        lines = [
            orjson.dumps({**row, "id": f"{row['id']}-{copy}"}, option=orjson.OPT_APPEND_NEWLINE)
            for copy in range(copies)
            for row in rows
        ]
        (kit / name).write_bytes(b"".join(lines))
