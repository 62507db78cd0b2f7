"""doctor: each finding says what was found and, when it is not well, what to do."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from counterfake.workspace import Workspace
from jobs import __main__ as command
from jobs import doctor


def by_check(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in findings}


def test_every_finding_that_is_not_good_says_what_to_do(workspace: Workspace) -> None:
    findings = doctor.examine(workspace)
    assert {"python", "ray", "torch", "disk", "storage", "mlflow", "ray token"} <= set(by_check(findings))
    assert all(f.advice for f in findings if f.state != "good")


def test_local_storage_has_conditional_writes(workspace: Workspace) -> None:
    finding = by_check(doctor.examine(workspace))["storage"]
    assert finding.state == "good"
    assert "server" not in finding.found, "a folder has none"


def test_object_storage_is_asked_whether_its_server_checks_bytes(tmp_path: Path, s3: object) -> None:
    (finding,) = doctor._storage(Workspace.at(tmp_path, s3.uri))  # type: ignore[attr-defined]
    assert finding.state == "good"
    assert "checked by the server" in finding.found or "checked by us alone" in finding.found


def test_a_port_in_use_is_found(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "detection service"})
        finding = by_check(list(doctor._ports(workspace)))[f"port {port}"]
    assert finding.state == "warn"
    assert "detection service" in finding.advice


def test_token_state_follows_mode_file_and_permissions(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert next(doctor._tokens(workspace)).state == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert next(doctor._tokens(workspace)).state == "bad"
    with monkeypatch.context() as pod:
        pod.setenv("RAY_AUTH_TOKEN", "given by KubeRay")
        assert next(doctor._tokens(workspace)).state == "good"
    token.write_text("secret")
    token.chmod(0o644)
    assert "chmod 600" in next(doctor._tokens(workspace)).advice
    token.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert next(doctor._tokens(workspace)).state == "good"


def test_an_unreachable_tracking_server_is_bad_with_its_address(tmp_path: Path, free_port: int) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    finding = next(doctor._tracking(Workspace.at(tmp_path, tracking_uri=uri)))
    assert finding.state == "bad"
    assert uri in finding.found


def test_json_is_a_list_of_findings(tmp_path: Path) -> None:
    result = CliRunner().invoke(command.app, ["doctor", "--json", "--home", str(tmp_path)])
    assert {"check", "state", "found", "advice"} == set(json.loads(result.stdout)[0])
