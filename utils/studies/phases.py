"""The two phases of a study, tuning and what was chosen: all of it, a part of it, or only a look at what would run."""

from __future__ import annotations

from pathlib import Path

from utils.logger import say
from utils.studies.executors import Workers, run_jobs
from utils.studies.jobs import (
    Job,
    final_jobs,
    jobs_before,
    remove_leftovers,
    require_same_study,
    save_choice,
    tuning_jobs,
)
from utils.studies.progress import Progress, committed_seconds, to_come
from utils.studies.shards import Shard, missing_text
from utils.studies.study import Study


def run_phase(jobs: list[Job], out: Path, workers: Workers, *, guess: float | None, part: str = "") -> None:
    """Run what is not done of some jobs and of those before them, once it is clear that what is done is theirs.

    Parts of a study may need the same job before theirs: one does it, the others wait.

    Args:
        jobs: of the phase, or of a part of it.
        out: folder of the outputs.
        workers: what runs them.
        guess: seconds of a run where none was finished yet.
        part: name of the part; empty for the whole.
    """
    before = jobs_before(jobs)
    require_same_study(jobs)
    for job in filter(lambda job: job.done, jobs):
        remove_leftovers(job)
    progress = Progress([*before, *jobs], out, processes=workers.count, guess=guess, part=part)
    own = set(before)
    for some in ([job for job in progress.left if job in own], [job for job in progress.left if job not in own]):
        for job, seconds in run_jobs(some, workers):
            progress.add(job, seconds)


def run_study(study: Study, out: Path, data: str, workers: Workers) -> None:
    """Tune, choose, and measure what was chosen; what is done is not done again."""
    guess = committed_seconds(study)
    run_phase(tuning_jobs(study, out, data), out, workers, guess=guess)
    save_choice(study, out)
    run_phase(final_jobs(study, out, data), out, workers, guess=guess)


def run_shard(study: Study, out: Path, data: str, workers: Workers, *, shard: Shard) -> None:
    """Do a part of tuning if any of tuning is left, else a part of what was chosen.

    One phase only: a part that went on alone would keep the others from their share of the next one.

    Raises:
        ValueError: this part of tuning is done, and others' is not; with what is missing.
    """
    guess, tuning = committed_seconds(study), tuning_jobs(study, out, data)
    missing = missing_text(tuning, shard)
    if missing is None:
        require_same_study(tuning)
        save_choice(study, out)
        final = final_jobs(study, out, data)
        run_phase(shard.part(final), out, workers, guess=guess, part=shard.name)
        missing = missing_text(final, shard)
        say(f"part {shard} is done" + (f"; of what was chosen {missing}" if missing else ", and so is the study"))
        return
    part = shard.part(tuning)
    if part and all(job.done for job in part):
        raise ValueError(f"nothing can be chosen yet: of tuning {missing}; run the other parts, then this one again")
    run_phase(part, out, workers, guess=guess, part=shard.name)
    missing = missing_text(tuning, shard)
    when = f"when the other parts are ({missing})" if missing else "now"
    say(f"part {shard} of tuning is done; {when}, the same commands train what is chosen")


def dry_run(study: Study, out: Path, data: str, *, processes: int, shard: Shard | None = None) -> dict:
    """Say what would run, of a part if there are several; return the numbers of runs."""
    guess, everything = committed_seconds(study), tuning_jobs(study, out, data)
    final_runs = final_jobs(study, out, data)
    require_same_study([*everything, *final_runs])
    if shard:
        say(f"part {shard} of each phase:")
    tuning, final = (shard.part(jobs) if shard else jobs for jobs in (everything, final_runs))
    tuning = Progress([*jobs_before(tuning), *tuning], out, processes=processes, guess=guess)
    final = Progress([*jobs_before(final), *final], out, processes=processes, guess=guess)
    say(f"{study.name}: {study.title}")
    count = f"{len(tuning.jobs)} runs, {len(tuning.left)} to do, {len(tuning.untrained)} to train"
    say(f"tuning: {count}, {tuning.estimate()}")
    open_choice = not all(job.done for job in everything)
    if open_choice:
        fewest, most = to_come(study, out)
        count = f"{fewest} to {most}" if fewest < most else f"{most}"
        say(f"then {count} more to train, with the chosen coefficients" + (", over all parts" if shard else ""))
    else:
        count = f"{len(final.jobs)} runs, {len(final.left)} to do, {len(final.untrained)} to train"
        say(f"chosen: {count}, {final.estimate()}")
    return {"tuning": len(tuning.left), "final": None if open_choice else len(final.left)}
