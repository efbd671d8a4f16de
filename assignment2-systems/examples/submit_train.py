"""Submit training to Slurm with submitit (`uv pip install submitit`), which also requeues preempted jobs.

python examples/submit_train.py --nodes 2 --gpus 8 -- --strategy fsdp gpt2-xl --run runs/xl
"""

import argparse
import os
import subprocess
import sys


class Training:
    """The job of each machine. When it is preempted, submitit calls `checkpoint` and submits the result."""

    def __init__(self, gpus: int, arguments: list[str]) -> None:
        self.gpus, self.arguments = gpus, arguments

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run",
                "--nnodes", str(job.num_nodes), "--nproc-per-node", str(self.gpus), "--max-restarts", "3",
                "--rdzv-backend", "c10d", "--rdzv-id", job.job_id, "--rdzv-endpoint", f"{job.hostnames[0]}:29500",
                "-m", "cs336_systems", "--", "train", *self.arguments,
            ],
            check=True,
        )  # fmt: skip

    def checkpoint(self, *_: object) -> object:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per machine")
    parser.add_argument("--hours", type=float, default=24, help="time limit in hours")
    parser.add_argument("--partition", default=None, help="Slurm partition")
    parser.add_argument("arguments", nargs="+", help="arguments of cs336-systems train, after --")
    parser.add_argument(
        "--cluster", default=None, help="slurm, or local to try it on this machine. Default: slurm if it is installed"
    )
    options = parser.parse_args()

    import submitit

    executor = submitit.AutoExecutor(folder=os.path.join("runs", "jobs"), cluster=options.cluster)
    executor.update_parameters(
        name="cs336-train", nodes=options.nodes, tasks_per_node=1, gpus_per_node=options.gpus, cpus_per_task=16,
        timeout_min=int(60 * options.hours), slurm_partition=options.partition,
    )  # fmt: skip
    job = executor.submit(Training(options.gpus, options.arguments))
    print(f"job {job.job_id}; its log: {job.paths.stdout}")


if __name__ == "__main__":
    main()
