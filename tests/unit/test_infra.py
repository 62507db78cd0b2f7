"""infra/ without a container engine: every file parses, names what exists, and promtool agrees with rules and alerts."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterfake import config
from counterfake.telemetry import METRICS
from serving.settings import Settings

INFRA = Path(__file__).resolve().parents[2] / "infra"
YAML = sorted(p for p in INFRA.rglob("*.y*ml"))
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
OURS = {spec.name + suffix for spec in METRICS for suffix in SUFFIXES[spec.kind]}


def ray_serve_names() -> set[str]:
    """Every metric that the installed Ray Serve defines, as Prometheus sees it."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "serve"
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        found.update(re.findall(r'"(serve_[a-z0-9_]+)"', path.read_text()))
    return {f"ray_{name}{suffix}" for name in found for suffix in ("", "_total", "_bucket", "_sum", "_count")}


def names_in(expression: str) -> set[str]:
    """Metric names in a PromQL expression: words with an underscore outside of quotes, braces and label lists."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    bare = re.sub(r"\b(by|on|group_left|without|ignoring)\s*\([^)]*\)", "", bare)
    return {
        word
        for word in re.findall(r"[a-z][a-z0-9_:]*", bare)
        if re.search("[_:]", word) and word != "histogram_quantile"
    }


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((INFRA / "grafana" / "dashboards" / "counterfake.json").read_text())


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text()))


def test_every_query_of_the_dashboard_names_a_metric_that_exists() -> None:
    known = OURS | ray_serve_names() | {rule["record"] for rule in rules() if "record" in rule}
    queries = [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]
    queries += [entry["expr"] for entry in dashboard()["annotations"]["list"]]
    assert len(queries) > 20
    for query in queries:
        named = names_in(query)
        assert named, query
        assert named <= known, f"{query}: no such metric {named - known}"


def test_every_metric_of_ours_is_on_the_dashboard_or_in_a_rule() -> None:
    text = json.dumps(dashboard()) + json.dumps(rules())
    unseen = [spec.name for spec in METRICS if spec.name not in text]
    assert unseen == []


def test_every_rule_names_a_metric_that_exists_and_says_what_to_do() -> None:
    known = OURS | {"up"} | {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        assert names_in(rule["expr"]) <= known, rule["expr"]
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "warn"), rule["alert"]
            assert {"summary", "action"} <= set(rule["annotations"]), rule["alert"]


def test_labels_in_queries_are_labels_of_the_metric() -> None:
    labels = {spec.name: set(spec.labels) for spec in METRICS}
    queries = [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]
    for query in [*queries, *(rule["expr"] for rule in rules())]:
        for name, inner in re.findall(r"(counterfake_[a-z_]+)\{([^}]*)\}", query):
            metric = name if name in labels else re.sub(r"_(bucket|sum|count)$", "", name)
            used = set(re.findall(r"(\w+)\s*[=!]~?", inner))
            assert used <= labels[metric] | {"le"}, query


@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)  # fmt: skip
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed; Debian: apt-get install prometheus")
    done = subprocess.run(
        [binary, *arguments], cwd=INFRA / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rayservice_is_what_its_script_renders_from_serve_yaml() -> None:
    script = INFRA / "kuberay" / "render.py"
    spec = importlib.util.spec_from_file_location("render", script)
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    rendered = render.render()
    assert render.TARGET.read_text() == rendered, "run python infra/kuberay/render.py"
    inside = yaml.safe_load(rendered)["spec"]["serveConfigV2"]
    assert yaml.safe_load(inside) == yaml.safe_load(render.SERVE.read_text())


def test_the_serve_config_is_one_that_ray_and_our_settings_accept() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    tree = yaml.safe_load((INFRA.parent / "serving" / "serve.yaml").read_text())
    deploy = schema.ServeDeploySchema.model_validate(tree)
    (application,) = deploy.applications
    assert application.import_path == "serving.app:application"
    settings = config.override(Settings(), config.flatten(application.args))
    assert settings.gateway.min_replicas >= 2
    assert tree["http_options"]["request_timeout_s"] >= settings.upload_seconds + settings.answer_seconds + 5


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_kuberay_manifests_use_token_auth_one_image_and_no_root(name: str) -> None:
    manifest = yaml.safe_load((INFRA / "kuberay" / f"{name}.yaml").read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] in (INFRA.parent / "constraints.txt").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["image"] == "counterfake:0.1.0"
            assert container["resources"]["limits"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_compose_names_only_services_and_volumes_that_it_defines() -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services, volumes = compose["services"], compose["volumes"]
    assert {"storage", "mlflow", "ray-head", "ray-worker", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (INFRA / source).exists(), f"{name}: {source}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port} beyond this machine"
        assert "no-new-privileges:true" in service["security_opt"], name


def test_compose_turns_token_authentication_on_everywhere_ray_runs() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for name in ("ray-head", "ray-worker", "serve"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"].startswith("/secrets/")
    assert "--allowed-hosts" in services["mlflow"]["command"]


def test_nothing_secret_is_written_into_the_files() -> None:
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix not in (".pyc",):
            assert not re.search(
                r"(?i)(password|secret_?key|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{16,}", path.read_text()
            ), path


def test_prometheus_scrapes_ports_that_compose_opens() -> None:
    scrape = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for job in scrape:
        for target in job["static_configs"][0]["targets"]:
            host, port = target.split(":")
            assert host in services
            assert port == "8000" or f"--metrics-export-port={port}" in services[host]["command"]


def test_the_image_runs_as_nobody_special_and_copies_what_exists() -> None:
    lines = (INFRA / "docker" / "Dockerfile").read_text().splitlines()
    assert "USER 1000:1000" in lines
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (INFRA.parent / source).exists(), line
