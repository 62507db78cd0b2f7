"""Model versions: bundles in storage by their digest, MLflow for names, versions, aliases and lineage. No pickle.

A version is a bundle twice: under `<bundles>/<digest>/`, which is what serving reads and needs no MLflow for, and as a
models-from-code pyfunc, so that `mlflow.pyfunc.load_model("models:/NAME@champion")` works. An alias moves through
`promote` only: first a numbered record in storage, which exactly one of several promoters can write, then MLflow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import counterfake
from counterfake import bundle as bundles
from counterfake.bundle import Bundle
from counterfake.errors import CheckpointError, GateError, NotFoundError, RegistryError, TrackingError
from counterfake.gate import Gate, figure, usual
from counterfake.storage import Store, open_store
from counterfake.temporary import temporary_folder
from counterfake.tracking import Tracker, connect, errors
from counterfake.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from counterfake.provenance import Signer, Signing

logger = logging.getLogger(__name__)

__all__ = ["Gate", "ModelVersion", "Registry", "opened"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One registered bundle."""

    name: str
    version: int
    digest: str  # of the bundle
    run_id: str  # the MLflow run that made it; "" if none
    aliases: tuple[str, ...]
    tags: dict[str, str]  # lineage: dataset, dataset_digest, commit, kind, preprocess_digest …
    bundle_uri: str  # folder in object storage

    @property
    def reference(self) -> str:
        """Names exactly this version."""
        return f"{self.name}/{self.version}"


Versions = list[ModelVersion]
Records = list[dict[str, Any]]


class Registry:
    """Names and versions in one MLflow, bundles in one store. Holds two strings, so it can be sent to workers."""

    def __init__(self, tracking_uri: str, bundles_uri: str, artifacts: str | None = None) -> None:
        self.tracking_uri = tracking_uri
        self.bundles_uri = bundles_uri
        self.artifacts = artifacts

    @classmethod
    def at(cls, workspace: Workspace) -> Registry:
        """The registry of a workspace."""
        return cls(workspace.tracking_uri, workspace.bundles, workspace.artifacts)

    def register(
        self, folder: Path, name: str, *, run_id: str = "", tags: Mapping[str, Any] | None = None
    ) -> ModelVersion:
        """A new version of `name` from a bundle folder. The same bundle again gives the version it already is."""
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"model name {name!r} must be letters, digits, '.', '_' or '-', at most 128 of them"
            )
        bundle = bundles.read(folder)
        known = [version for version in self._versions(name) if version.digest == bundle.digest]
        if known:
            return known[-1]
        self._publish(bundle)
        labels = {
            **_lineage(bundle, run_id, self._uri(bundle.digest)),
            **{k: str(v) for k, v in (tags or {}).items()},
        }
        with errors(self.tracking_uri):
            client = self._client
            _create_name(client, name)
            source, model_id = self._log_model(client, bundle, name, run_id)
            # without a run MLflow would look the model id up in its global store, not in this one
            known_id = model_id if run_id else None
            made = client.create_model_version(name, source, run_id or None, tags=labels, model_id=known_id)
        return self.get(f"{name}/{made.version}")

    def get(self, reference: str) -> ModelVersion:
        """The version that "name@alias", "name/3" or "name" (the newest) stands for. Raises RegistryError."""
        name, alias, number = _parse(reference)
        versions = self._versions(name)
        if not versions:
            raise self._unknown(name)
        for version in reversed(versions):
            if (alias in version.aliases) if alias else number in (None, version.version):
                return version
        numbers = ", ".join(str(version.version) for version in versions[-10:])
        aliases = sorted(f"@{a} -> {v.version}" for v in versions for a in v.aliases)
        raise RegistryError(
            f"model {name!r} has no {f'alias @{alias}' if alias else f'version {number}'}; "
            f"versions: {numbers}; aliases: {', '.join(aliases) or 'none'}"
        )

    def list(self, name: str | None = None) -> Versions:
        """All versions, of one model or of all, oldest first within a name. RegistryError for an unknown name."""
        if name is not None:
            found = self._versions(_parse(name)[0])
            if not found:
                raise self._unknown(name)
            return found
        return [version for known in self._names() for version in self._versions(known)]

    def fetch(self, reference: str, cache: Path) -> Path:
        """A verified local copy of the bundle. When MLflow is away, an alias is read from the promotions in storage."""
        return self.fetch_digest(self._digest(reference), cache)

    def fetch_digest(self, digest: str, cache: Path) -> Path:
        """A verified local copy of the bundle with this digest: what serving needs, with or without MLflow."""
        target = cache / "bundles" / digest
        if target.is_dir():
            try:
                return bundles.read(target).folder
            except CheckpointError as error:
                logger.warning("the cached copy is thrown away: %s", error)
                shutil.rmtree(target)
        return self._download(digest, target)

    def promote(
        self,
        name: str,
        version: int,
        alias: str = "champion",
        gate: Gate | None = None,
        expected: int | None = None,
    ) -> ModelVersion:
        """Point `alias` to `version` if the gate passes and nobody else moves it meanwhile.

        gate: None = the usual one of the alias (gate.py), `Gate()` = none.
        expected: the version the alias must point to now (0 = none). Raises GateError, or RegistryError for the slower
        of two promoters."""
        if not _ALIAS.fullmatch(alias):
            raise RegistryError(f"alias {alias!r} must be lower-case letters, digits, '_' or '-'")
        chosen = self.get(f"{name}/{version}")
        records = self._promotions(name, alias)
        current = self._current(name, alias, records)
        _expect(name, alias, current, expected, "promote")
        self._pass(usual(alias) if gate is None else gate, chosen, current, alias)
        self._record(chosen, alias, records, current)
        self._settle(name, alias)
        return self.get(chosen.reference)

    def rollback(self, name: str, alias: str = "champion", expected: int | None = None) -> ModelVersion:
        """Point `alias` back to the version it pointed to before the current one. No gate: it has passed already.

        expected: as `promote`."""
        records = self._promotions(name, alias)
        current = self._current(name, alias, records)
        _expect(name, alias, current, expected, "roll back")
        trail = _trail(records)
        if len(trail) < 2:
            raise RegistryError(f"{name}@{alias} has no earlier version to go back to")
        chosen = self.get(f"{name}/{trail[-2]}")
        self._record(chosen, alias, records, current, rollback=True)
        self._settle(name, alias)
        return self.get(chosen.reference)

    def promotions(self, name: str, alias: str = "champion") -> Records:
        """Every move of an alias, oldest first: version, digest, previous, at, rollback."""
        return self._promotions(name, alias)

    # -- private ----------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> MlflowClient:
        return connect(self.tracking_uri)

    @property
    def _store(self) -> Store:
        return open_store(self.bundles_uri)

    def _uri(self, digest: str) -> str:
        return f"{self.bundles_uri}/{digest}"

    def _publish(self, bundle: Bundle) -> None:
        if not self._store.exists(f"{bundle.digest}/{bundles.MANIFEST}"):
            self._store.publish(bundle.folder, bundle.digest, last=bundles.MANIFEST)

    def _download(self, digest: str, target: Path) -> Path:
        temporary = target.parent / f".{digest}.{uuid.uuid4().hex}"
        try:
            self._store.download(digest, temporary)
            found = bundles.read(temporary).digest
            if found != digest:
                raise CheckpointError(
                    f"bundle {self._uri(digest)} has digest {found}; it was altered in storage"
                )
            try:
                os.rename(temporary, target)
            except OSError:  # another process was faster
                return bundles.read(target).folder
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _digest(self, reference: str) -> str:
        try:
            return self.get(reference).digest
        except RegistryError:
            raise
        except TrackingError as error:
            name, alias, _ = _parse(reference)
            records = self._promotions(name, alias) if alias else []
            if not records:
                raise
            logger.warning("%s; using the last recorded promotion of %s", error, reference)
            return str(records[-1]["digest"])

    def _names(self) -> tuple[str, ...]:
        with errors(self.tracking_uri):
            return tuple(sorted(m.name for m in self._client.search_registered_models(max_results=1000)))

    def _unknown(self, name: str) -> RegistryError:
        names = self._names()
        there = (
            f"it has {', '.join(names[:10])}"
            if names
            else "it has none yet: a training job with register_as makes one, `counterfake run fit-ensemble` an ensemble"
        )
        return RegistryError(f"no model {name!r} in MLflow at {self.tracking_uri}; {there}")

    def _versions(self, name: str) -> Versions:
        with errors(self.tracking_uri):
            found = self._client.search_model_versions(f"name = '{name}'", max_results=1000)
            # the search leaves aliases out
            aliases = self._client.get_registered_model(name).aliases if found else {}
        versions = [_version(entry, aliases) for entry in found if "bundle_digest" in entry.tags]
        return sorted(versions, key=lambda version: version.version)

    def _log_model(self, client: MlflowClient, bundle: Bundle, name: str, run_id: str) -> tuple[str, str]:
        run = client.get_run(run_id) if run_id else None
        experiment = (
            run.info.experiment_id
            if run
            else Tracker(self.tracking_uri, self.artifacts).experiment("registry")
        )
        logged = client.create_logged_model(
            experiment, name=name, source_run_id=run_id or None, model_type=bundle.kind
        )
        with temporary_folder() as folder:
            _save_pyfunc(folder / "model", bundle)
            client.log_model_artifacts(logged.model_id, str(folder / "model"))
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.artifact_location), str(logged.model_id)

    def _pass(self, gate: Gate, chosen: ModelVersion, current: int, alias: str) -> None:
        if gate == Gate():
            return
        before = self._evaluation(self.get(f"{chosen.name}/{current}").digest) if current else None
        failed = gate.check(self._evaluation(chosen.digest), before, self._sources(chosen.digest))
        if failed:
            stays = f"stays version {current}" if current else "is not set"
            raise GateError(
                f"{chosen.reference} does not become @{alias}: {'; '.join(failed)}; @{alias} {stays}"
            )

    def _evaluation(self, digest: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._store.read(f"{digest}/{bundles.EVALUATION}")))
        except NotFoundError:
            return None

    def _sources(self, digest: str) -> dict[str, Any]:
        info = json.loads(self._store.read(f"{digest}/{bundles.MANIFEST}"))
        return dict(info.get("sources") or {})

    def _promotions(self, name: str, alias: str) -> Records:
        keys = sorted(entry.key for entry in self._store.list(_journal(name, alias)))
        return [json.loads(self._store.read(key)) for key in keys]

    def _current(self, name: str, alias: str, records: Records) -> int:
        """The version an alias stands for: the journal's word, or MLflow's where there is no journal yet. 0 = none."""
        if records:
            return int(records[-1]["version"])
        return next((v.version for v in self._versions(name) if alias in v.aliases), 0)

    def _record(
        self,
        chosen: ModelVersion,
        alias: str,
        records: Records,
        current: int,
        rollback: bool = False,
    ) -> None:
        record = {
            "version": chosen.version,
            "digest": chosen.digest,
            "previous": current,
            "rollback": rollback,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        key = f"{_journal(chosen.name, alias)}{len(records) + 1:06d}.json"
        if not self._store.put_if_absent(key, json.dumps(record).encode()):
            raise RegistryError(
                f"{chosen.name}@{alias} was moved by somebody else at the same moment; look at it and promote again"
            )

    def _settle(self, name: str, alias: str) -> None:
        """Make MLflow say what the journal says, also when a faster promoter is slower to reach MLflow."""
        while True:
            version = self._promotions(name, alias)[-1]["version"]
            with errors(self.tracking_uri):
                self._client.set_registered_model_alias(name, alias, str(version))
            if self._promotions(name, alias)[-1]["version"] == version:
                return


# -- private --------------------------------------------------------------------------------------------------------

# What MLflow runs to load a version: code kept as text beside the weights, so nothing is unpickled.
_ENTRY = '''"""The bundle beside this file, through counterfake's own predictor: {says}."""

import os
from typing import Any

import mlflow


class BundleModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        from counterfake.provenance import Signing
        from counterfake.registry import opened

        key = {{"certificate": os.environ.get("COUNTERFAKE_C2PA_CERT", ""), "key": os.environ.get("COUNTERFAKE_C2PA_KEY", "")}}
        self.answer = opened(context.artifacts["bundle"], Signing(**key))

    def predict(self, context: Any, model_input: list[{takes}], params: Any = None) -> list[{gives}]:
        return self.answer(list(model_input))


mlflow.models.set_model(BundleModel())
'''
_DETECTS = {"says": "encoded pictures -> probability of being fake, each", "takes": "bytes", "gives": "float"}
_PAINTS = {
    "says": "seeds -> one PNG each, marked as synthetic; of several classes the seed draws one",
    "takes": "int",
    "gives": "bytes",
}


def opened(folder: str | Path, sign: Signing | None = None) -> Callable[[Any], Any]:
    """What a bundle does as an MLflow model: pictures -> probabilities, or for a generator seeds -> PNG files, which are
    signed where `sign` names a key. Raises ConfigError for a key that does not sign."""
    bundle = bundles.read(Path(folder))
    if bundle.kind == "generator":
        signer = sign.load() if sign else None
        return functools.partial(_paint, bundle, bundles.load_nets(bundle)["generator"], signer)
    from counterfake import predictor

    return predictor.load(Path(folder)).predict_bytes


def _paint(bundle: Bundle, net: Any, signer: Signer | None, seeds: Sequence[int]) -> Sequence[bytes]:
    """A PNG per seed; of a conditional generator the seed draws the class too, each equally often."""
    import torch

    from counterfake import images, media, provenance

    settings = bundle.config["generator"]
    width, classes = int(settings["noise_size"]), int(settings.get("classes", 0))
    sources = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise = torch.stack([torch.randn(width, generator=source) for source in sources])
    asked = (
        [torch.stack([torch.randint(classes, (), generator=source) for source in sources])] if classes else []
    )
    with torch.inference_mode():
        pictures = images.to_uint8(net(noise, *asked)).permute(0, 2, 3, 1).numpy()
    maker = f"{bundle.name}@{bundle.digest[:8]}"
    return [provenance.mark(media.encode(pixels, "png"), maker=maker, signer=signer) for pixels in pictures]


def _save_pyfunc(folder: Path, bundle: Bundle) -> None:
    import mlflow.pyfunc

    with temporary_folder() as temporary:
        entry = temporary / "entry.py"
        entry.write_text(_ENTRY.format(**(_PAINTS if bundle.kind == "generator" else _DETECTS)))
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(entry),
            artifacts={"bundle": str(bundle.folder)},
            pip_requirements=[f"counterfake=={counterfake.__version__}"],
            metadata={"bundle_digest": bundle.digest, "kind": bundle.kind},
        )


def _create_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _parse(reference: str) -> tuple[str, str, int | None]:
    """(name, alias or "", version or None)."""
    text = reference.removeprefix("models:/")
    match = re.fullmatch(rf"({_NAME.pattern})(?:@({_ALIAS.pattern})|/([0-9]+))?", text)
    if match is None:
        raise RegistryError(f"{reference!r} names no model; write name, name@champion or name/3")
    return match[1], match[2] or "", int(match[3]) if match[3] else None


def _version(entry: Any, aliases: Mapping[str, Any]) -> ModelVersion:
    number, tags = int(entry.version), dict(entry.tags)
    return ModelVersion(
        name=entry.name,
        version=number,
        digest=tags["bundle_digest"],
        run_id=entry.run_id or "",
        aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == number)),
        tags=tags,
        bundle_uri=tags["bundle_uri"],
    )


def _lineage(bundle: Bundle, run_id: str, uri: str) -> dict[str, str]:
    dataset = bundle.info.get("dataset") or {}
    evaluation = bundle.evaluation or {}
    labels = {
        "bundle_digest": bundle.digest,
        "bundle_uri": uri,
        "kind": bundle.kind,
        "run_id": run_id or bundle.info.get("run_id") or "",
        "commit": bundle.info.get("commit") or "",
        "created_at": bundle.info.get("created_at") or "",
        "preprocess_digest": bundle.info.get("preprocess_digest") or "",
        "dataset": f"{str(dataset.get('uri', '')).partition('@')[0]}@{dataset.get('version', '')}"
        if dataset
        else "",
        "dataset_digest": str(dataset.get("digest", "")),
    }
    measured = {name: figure(evaluation, name, "value") for name in ("auc", "accuracy", "ece")}
    return {k: v for k, v in labels.items() if v} | {
        k: f"{v:.4f}" for k, v in measured.items() if v is not None
    }


def _expect(name: str, alias: str, current: int, expected: int | None, doing: str) -> None:
    if expected is not None and expected != current:
        raise RegistryError(
            f"{name}@{alias} is version {current or 'none'}, not {expected or 'none'} as expected: somebody "
            f"promoted meanwhile; look at it and {doing} again with expected={current}"
        )


def _journal(name: str, alias: str) -> str:
    return f"promotions/{name}@{alias}/"


def _trail(records: Records) -> list[int]:
    """The versions an alias stood for, as a stack: a rollback takes the last one off."""
    trail: list[int] = [records[0]["previous"]] if records and records[0]["previous"] else []
    for record in records:
        if record["rollback"]:
            trail.pop()
        elif not trail or trail[-1] != record["version"]:
            trail.append(record["version"])
    return trail
