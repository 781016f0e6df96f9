"""The whole page of a record."""

from pathlib import Path

from launch.study.asked import made_up_blocks, question_blocks
from launch.study.claims import claim_blocks
from launch.study.forgotten import forgotten_blocks
from launch.study.losses import context_blocks, lasting_blocks, loss_blocks
from launch.study.memory import memory_blocks
from launch.study.page import Block, Command, Heading, Text, write_html, write_markdown
from launch.study.record import Record, counted

TITLE = "The paper at small scale"


def page_blocks(record: Record) -> list[Block]:
    """Everything, in the order of the page."""
    return [
        *_about(record),
        *claim_blocks(record),
        *context_blocks(record),
        *loss_blocks(record),
        *memory_blocks(record),
        *forgotten_blocks(record),
        *question_blocks(record),
        *lasting_blocks(record),
        *made_up_blocks(record),
    ]


def write(record: Record, report: Path, markdown: Path | None) -> None:
    """Writes report/study.html, and the same as Markdown where that is asked for."""
    blocks = page_blocks(record)
    write_html(report / "study.html", TITLE, blocks)
    if markdown is not None:
        write_markdown(markdown, TITLE, blocks)


def missing(record: Record) -> list[str]:
    """Runs that were expected and have not finished, with what is known of them."""
    states = {run["name"]: run for run in record["runs"]}
    found = []
    for name in record["expected"]:
        run = states.get(name)
        if run is None:
            found.append(name)
        elif run["loss"] is None:
            found.append(f"{name} ({run['state']} at step {run['steps']:,})")
    return found


def _about(record: Record) -> list[Block]:
    finished = [run for run in record["runs"] if run["loss"] is not None]
    searches = sum(len(run["searches"]) + len(run["unreached"]) for run in finished)
    commit = f" at commit {record['commit']}" if record.get("commit") else ""
    searched = "1 search" if searches == 1 else f"{searches:,} searches"
    made_of = f"{counted(len(finished), 'finished run')} and {searched}"
    blocks: list[Block] = [
        Text(
            "Selective attention (Leviathan, Kalman and Matias, ICLR 2025) beside the standard transformer, in "
            "models "
            "that this repository trains on a laptop's processor. Everything below is computed from the runs' "
            f"files by one command; nothing is typed by hand. Made of {made_of}{commit}."
        ),
        Command(record["command"]),
    ]
    if record["seconds"]:
        blocks.append(
            Text(
                f"All commands together took {record['seconds'] / 60:.1f} minutes by the clock, up to "
                f"{record['at_once']} of them at once, and {record['processor_seconds'] / 60:.1f} minutes of "
                "processor time, what was interrupted included."
            )
        )
    if gaps := missing(record):
        blocks += [
            Heading("Missing", small=True),
            Text(f"{len(gaps)} of {len(record['expected'])} runs, of which nothing is said below: {', '.join(gaps)}."),
        ]
    return blocks
