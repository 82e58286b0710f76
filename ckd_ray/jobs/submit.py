"""Jobs of a cluster: Ray's client, and what is sent to it."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ckd_ray import __version__
from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError, first_line
from ckd_ray.jobs.bundle import CONFIG_NAME, HOME, write_bundle
from ckd_ray.progress import say, without_secrets
from ckd_ray.ray_util.machines import NODES_VARIABLE, RESOURCES_VARIABLE
from ckd_ray.ray_util.token import has_token, use_token

# The log of a job holds both its outputs. The job marks the line of `--json` with the text that it finds in this
# variable. Everything before the line BEGIN is Ray's own.
MARK_VARIABLE = "CKD_RAY_OBJECT_MARK"
MARK = "ckd-ray-object: "
BEGIN = "ckd-ray-job-begins"
STOP_WITHIN_S = 60
_HTTP_TIMEOUT_S = 20.0
_APP = "ckd-ray"
_SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class JobRequest:
    """A command to run on a cluster.

    Attributes:
        command: `train`, `embed`, ...
        options: its options, without the configuration.
        wait_for_nodes: the job begins when so many nodes are there.
    """

    command: str
    options: Sequence[str]
    config: Config
    wait_for_nodes: int = 1

    @property
    def run(self) -> str:
        """Where the run is; jobs of a run are found by it."""
        return f"{self.config.run.storage.rstrip('/')}/{self.config.run.name}"

    def entrypoint(self) -> str:
        """The shell command. The configuration is in the working directory of the job; relative paths start at HOME."""
        words = shlex.join([self.command, *self.options])
        # The launcher sets OMP_NUM_THREADS to 1 for everything that it starts, and Ray for tasks without a CPU.
        return (
            f'job="$PWD"; mkdir -p {HOME} && cd {HOME} && unset OMP_NUM_THREADS && echo {BEGIN}'
            f' && exec "$(command -v python || command -v python3)" -m ckd_ray {words} --config "$job/{CONFIG_NAME}"'
        )

    def environment(self) -> dict[str, str]:
        """The variables that are set for the job. The user's own is what the command asks the autoscaler for."""
        values = {
            MARK_VARIABLE: MARK,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S),
        }
        if asked := os.environ.get(RESOURCES_VARIABLE):
            values[RESOURCES_VARIABLE] = asked
        return values | ({NODES_VARIABLE: str(self.wait_for_nodes)} if self.wait_for_nodes > 1 else {})

    def new_id(self) -> str:
        """A name chosen here, so that the job can be found even if the answer to sending it is lost."""
        return f"{self.config.run.name}-{self.command}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class Jobs:
    """The jobs of a dashboard. Methods raise ConnectionError where it is out of reach at the moment.

    Args:
        address: of the dashboard.
        where: what the user called the cluster, for messages.
        ensure: makes the address reachable, or raises ConnectionError.
    """

    def __init__(self, address: str, where: str, ensure: Callable[[], None] = lambda: None) -> None:
        self._address, self._where, self._ensure = address, where, ensure
        self._client: Any = None

    def submit(self, request: JobRequest, job: str) -> None:
        """Send the package, the configuration and the command, unless the job is there already."""
        if any(details.submission_id == job for details in self.all()):
            return
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "job.zip"
            write_bundle(request.config, bundle)
            self._ask(
                lambda client: client.submit_job(
                    entrypoint=request.entrypoint(),
                    submission_id=job,
                    runtime_env={"working_dir": str(bundle), "env_vars": request.environment()},
                    metadata={
                        "app": _APP,
                        "version": __version__,
                        "run": without_secrets(request.run),
                        "command": request.command,
                    },
                )
            )

    def info(self, job: str) -> Any:
        """Ray's JobDetails.

        Raises:
            UserError: the cluster knows no such job.
        """
        try:
            return self._ask(lambda client: client.get_job_info(job))
        except JobError as error:
            if "status code 404" not in str(error):
                raise
        known = ", ".join(d.submission_id for d in self.all()[-5:])
        raise UserError("this cluster knows no such job", where=job, expected=known or "none has been submitted")

    def all(self) -> list[Any]:
        """The submitted jobs, oldest first."""
        found = [details for details in self._ask(lambda client: client.list_jobs()) if details.submission_id]
        return sorted(found, key=lambda details: details.start_time or 0)

    def stop(self, job: str) -> None:
        """Ask the job to end within STOP_WITHIN_S seconds."""
        self._ask(lambda client: client.stop_job(job))

    def log(self, job: str) -> str:
        """Everything that the job has printed."""
        return str(self._ask(lambda client: client.get_job_logs(job)))

    def nodes(self) -> list[dict[str, Any]]:
        """Address, state, CPUs and GPUs of every node, the head first."""
        answer = self._ask(lambda client: client._do_request("GET", "/api/v0/nodes?limit=1000&detail=1").json())
        rows = answer.get("data", {}).get("result", {}).get("result", [])
        found = [
            {
                "address": row["node_ip"],
                "state": row["state"],
                "head": bool(row.get("is_head_node")),
                "resources": {k: float(v) for k, v in (row.get("resources_total") or {}).items() if k in _SHOWN},
            }
            for row in rows
        ]
        return sorted(found, key=lambda node: (not node["head"], node["address"]))

    def client(self) -> Any:
        """Ray's client, with a limit on the time of an answer. UserError when the dashboard refuses our token."""
        return self._ask(lambda client: client)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        self._ensure()
        try:
            if self._client is None:
                self._client = _client(self._address)
            return question(self._client)
        except AuthenticationError:
            raise UserError(
                "this cluster asks for a token, and refuses ours" if has_token() else "this cluster asks for a token",
                where=self._where,
                expected="the token that its head was started with",
                fix="put it into ~/.ray/auth_token (mode 0600) or RAY_AUTH_TOKEN",
            ) from None
        except (requests.RequestException, OSError) as error:
            raise ConnectionError(first_line(error, 200)) from error
        except RuntimeError as error:
            if "status code 5" in str(error):  # the dashboard is starting, or a part of it has died
                raise ConnectionError(first_line(error, 200)) from error
            if "Version check returned 404" in str(error):
                raise ConnectionError("what listens there is not the dashboard of a Ray") from error
            raise JobError(f"{self._where}: {str(error).strip()[:500]}") from error


def _client(address: str) -> Any:
    use_token()
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to the address that it is given
        os.environ.pop(variable, None)
    try:
        import aiohttp  # noqa: F401  (without it Ray's client fails later, with a message that says less)
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError(
            "jobs need Ray's extra `default`", where="--cluster", fix="pip install 'ckd-ray[cluster]'"
        ) from error

    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """With a limit on the time of an answer; Ray's own waits forever."""

        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            kwargs.setdefault("timeout", _HTTP_TIMEOUT_S)
            return super()._do_request(method, endpoint, **kwargs)

    return Client(address)


def running(jobs: Jobs, run: str) -> str | None:
    """The job that is running in this run, if there is one."""
    for details in jobs.all():
        ours = (details.metadata or {}).get("app") == _APP
        if ours and details.metadata.get("run") == without_secrets(run) and not details.status.is_terminal():
            return str(details.submission_id)
    return None


def which(jobs: Jobs, job: str | None) -> str:
    """The named job; else our newest job that runs; else our newest job. UserError when there is none."""
    if job is not None:
        return str(jobs.info(job).submission_id)
    ours = [d for d in jobs.all() if (d.metadata or {}).get("app") == _APP]
    live = [d for d in ours if not d.status.is_terminal()]
    if not ours:
        raise UserError("no job of ckd-ray has been sent to this cluster", where="JOB")
    chosen = str((live or ours)[-1].submission_id)
    say(f"job {chosen}")
    return chosen
