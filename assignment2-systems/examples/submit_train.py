"""The same with submitit (`uv pip install submitit`), which writes the batch script and requeues what was preempted.

python examples/submit_train.py --nodes 2 --gpus 8 -- --strategy fsdp gpt2-xl --run runs/xl
"""

import argparse
import os
import subprocess
import sys


class Training:
    """What runs on each machine; submitit calls `checkpoint` when the job is preempted, and submits what it returns."""

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
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each")
    parser.add_argument("--hours", type=float, default=24, help="time limit")
    parser.add_argument("--partition", default=None, help="Slurm partition")
    parser.add_argument("arguments", nargs="+", help="of cs336-systems train, after --")
    parser.add_argument("--cluster", default=None, help="slurm, or local for a try here. Default: what is there")
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
