"""Jobs of a cluster: the client, what is submitted, and which job is meant."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ckd_ray import __version__
from ckd_ray.config import Config
from ckd_ray.errors import JobError, UserError
from ckd_ray.jobs.bundle import CONFIG_NAME, HOME, write_bundle
from ckd_ray.jobs.tunnel import Way
from ckd_ray.progress import say, without_secrets
from ckd_ray.ray_util.token import has_token, use_token

# A job's standard output and error come home as one log. The line of `--json` is told from the rest by this mark, which
# the job is given in its environment; everything before the line BEGIN is Ray's own.
MARK_VARIABLE = "CKD_RAY_OBJECT_MARK"
MARK = "ckd-ray-object: "
BEGIN = "ckd-ray-job-begins"
NODES_VARIABLE = "CKD_RAY_WAIT_FOR_NODES"
STOP_WITHIN_S = 60
_HTTP_TIMEOUT_S = 20.0
_APP = "ckd-ray"
_SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class JobRequest:
    """A command to run on a cluster.

    Attributes:
        command: `train`, `embed`, ...
        options: its options, but for the configuration.
        wait_for_nodes: the job begins when so many nodes are there.
    """

    command: str
    options: Sequence[str]
    config: Config
    wait_for_nodes: int = 1

    @property
    def run(self) -> str:
        """Where the run is, for people and to find its jobs."""
        return f"{self.config.run.storage.rstrip('/')}/{self.config.run.name}"

    def entrypoint(self) -> str:
        """The shell command. Its configuration is in the working directory, and its own relative paths below HOME."""
        words = shlex.join([self.command, *self.options])
        # The launcher sets OMP_NUM_THREADS to 1 for all that it starts, and Ray for what has no CPU of its own.
        return (
            f'job="$PWD"; mkdir -p {HOME} && cd {HOME} && unset OMP_NUM_THREADS && echo {BEGIN}'
            f' && exec "$(command -v python || command -v python3)" -m ckd_ray {words} --config "$job/{CONFIG_NAME}"'
        )

    def environment(self) -> dict[str, str]:
        """What the job finds in its environment; nothing of the user's own."""
        values = {
            MARK_VARIABLE: MARK,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S),
        }
        return values | ({NODES_VARIABLE: str(self.wait_for_nodes)} if self.wait_for_nodes > 1 else {})

    def new_id(self) -> str:
        """Chosen here, so that an answer that got lost leaves no doubt which job was meant."""
        return f"{self.config.run.name}-{self.command}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class Jobs:
    """The jobs of the dashboard behind `way`.

    Methods raise ConnectionError where the dashboard is out of reach at the moment.
    """

    def __init__(self, way: Way, where: str) -> None:
        self._way, self._where = way, where
        self._client: Any = None

    def submit(self, request: JobRequest, job: str) -> None:
        """Send the package, the configuration and the command. What has arrived before is not sent again."""
        client = self.client()
        if any(details.submission_id == job for details in self.all()):
            return
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "job.zip"
            write_bundle(request.config, bundle)
            self._asked(
                lambda: client.submit_job(
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
        client = self.client()
        try:
            return self._asked(lambda: client.get_job_info(job))
        except JobError as error:
            if "status code 404" not in str(error):
                raise
        known = ", ".join(d.submission_id for d in self.all()[-5:])
        raise UserError("this cluster knows no such job", where=job, expected=known or "none has been submitted")

    def all(self) -> list[Any]:
        """The submitted jobs, oldest first."""
        client = self.client()
        found = [details for details in self._asked(client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda details: details.start_time or 0)

    def stop(self, job: str) -> None:
        """Ask the job to end; it is given STOP_WITHIN_S seconds."""
        client = self.client()
        self._asked(lambda: client.stop_job(job))

    def log(self, job: str) -> str:
        """All that the job has printed."""
        client = self.client()
        return str(self._asked(lambda: client.get_job_logs(job)))

    def nodes(self) -> list[dict[str, Any]]:
        """Address, state, CPUs and GPUs of every node, the head first."""
        client = self.client()
        answer = self._asked(lambda: client._do_request("GET", "/api/v0/nodes?limit=1000&detail=1"))
        rows = self._asked(answer.json).get("data", {}).get("result", {}).get("result", [])
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
        """Ray's client, whose requests end in time.

        Raises:
            UserError: the dashboard refuses our token.
        """
        self._way.ensure()
        if self._client is None:
            self._client = self._asked(lambda: _client(self._way.address))
        return self._client

    def _asked(self, question: Any) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError as error:
            raise self._refused(error) from None
        except (requests.RequestException, OSError) as error:
            raise ConnectionError((str(error).splitlines() or [type(error).__name__])[0][:200]) from error
        except RuntimeError as error:
            if "status code 5" in str(error):  # a dashboard that is starting, or has lost a part of its own
                raise ConnectionError(str(error).splitlines()[0][:200]) from error
            raise JobError(f"{self._where}: {str(error).strip()[:500]}") from error

    def _refused(self, error: BaseException) -> UserError:
        return UserError(
            "this cluster asks for a token, and refuses ours" if has_token() else "this cluster asks for a token",
            where=self._where,
            expected="the token that its head was started with",
            fix="put it into ~/.ray/auth_token (mode 0600) or RAY_AUTH_TOKEN",
        )


def _client(address: str) -> Any:
    use_token()
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would win over the address that is given
        os.environ.pop(variable, None)
    try:
        import aiohttp  # noqa: F401  (Ray's client finds out later, and says less)
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError(
            "jobs need Ray's extra `default`", where="--cluster", fix="pip install 'ckd-ray[cluster]'"
        ) from error

    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """With a limit on how long an answer may take; Ray's own waits for ever."""

        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            kwargs.setdefault("timeout", _HTTP_TIMEOUT_S)
            return super()._do_request(method, endpoint, **kwargs)

    return Client(address)


def running(jobs: Jobs, run: str) -> str | None:
    """A job that works in this run at the moment."""
    for details in jobs.all():
        ours = (details.metadata or {}).get("app") == _APP
        if ours and details.metadata.get("run") == without_secrets(run) and not details.status.is_terminal():
            return str(details.submission_id)
    return None


def which(jobs: Jobs, job: str | None) -> str:
    """The named job; else the newest of ours that runs; else the newest of ours.

    Raises:
        UserError: there is none.
    """
    if job is not None:
        return str(jobs.info(job).submission_id)
    ours = [d for d in jobs.all() if (d.metadata or {}).get("app") == _APP]
    live = [d for d in ours if not d.status.is_terminal()]
    if not ours:
        raise UserError("no job of ckd-ray has been sent to this cluster", where="JOB")
    chosen = str((live or ours)[-1].submission_id)
    say(f"job {chosen}")
    return chosen
