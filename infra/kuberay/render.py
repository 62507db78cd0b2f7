"""Writes rayservice.yaml: the manifest below with serving/serve.yaml inside. A test runs it and compares.

python infra/kuberay/render.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVE = HERE.parent.parent / "serving" / "serve.yaml"
TARGET = HERE / "rayservice.yaml"

MANIFEST = """\
# Rendered by infra/kuberay/render.py from serving/serve.yaml; change that file and run the script.
# The detection service: Serve's port 8000 behind the Service `counterfake-serve-svc`. KubeRay 1.5.1 or newer.
# Moving the alias @champion is followed by the running pods; a change of this manifest makes a new cluster beside the old
# one and moves traffic when it is ready, which needs twice the resources for that time.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: counterfake
spec:
  serviceUnhealthySecondThreshold: 900
  deploymentUnhealthySecondThreshold: 300
  serveConfigV2: |
{serve}
  rayClusterConfig:
    rayVersion: "2.60.0"
    authOptions:
      mode: token
    enableInTreeAutoscaling: true
    headGroupSpec:
      rayStartParams:
        num-cpus: "0"
        dashboard-host: 0.0.0.0
        metrics-export-port: "8091"
      template:
        spec:
          securityContext: &pod
            runAsNonRoot: true
            runAsUser: 1000
            runAsGroup: 1000
            fsGroup: 1000
            seccompProfile: {{type: RuntimeDefault}}
          containers:
            - name: ray-head
              image: counterfake:0.1.0
              envFrom: &environment
                - configMapRef: {{name: counterfake}}
                - secretRef: {{name: counterfake-storage}}
              securityContext: &container
                allowPrivilegeEscalation: false
                capabilities: {{drop: [ALL]}}
              ports:
                - {{containerPort: 6379, name: gcs}}
                - {{containerPort: 8265, name: dashboard}}
                - {{containerPort: 8000, name: serve}}
                - {{containerPort: 8091, name: metrics}}
              resources:
                requests: {{cpu: "1", memory: 4Gi}}
                limits: {{cpu: "2", memory: 4Gi}}
              volumeMounts: &mounts
                - {{name: cache, mountPath: /var/lib/counterfake}}
                - {{name: shm, mountPath: /dev/shm}}
          volumes: &volumes
            - {{name: cache, emptyDir: {{}}}}
            - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: 2Gi}}}}
    workerGroupSpecs:
      - groupName: detectors
        replicas: 2
        minReplicas: 2
        maxReplicas: 8
        rayStartParams:
          metrics-export-port: "8091"
        template:
          spec:
            securityContext: *pod
            terminationGracePeriodSeconds: 60
            containers:
              - name: ray-worker
                image: counterfake:0.1.0
                envFrom: *environment
                securityContext: *container
                ports:
                  - {{containerPort: 8000, name: serve}}
                  - {{containerPort: 8091, name: metrics}}
                resources:
                  requests: {{cpu: "2", memory: 4Gi}}
                  limits: {{cpu: "2", memory: 4Gi}}
                volumeMounts: *mounts
            volumes: *volumes
"""


def render() -> str:
    """The whole manifest."""
    lines = SERVE.read_text().rstrip().splitlines()
    return MANIFEST.format(serve="\n".join(f"    {line}".rstrip() for line in lines))


if __name__ == "__main__":
    TARGET.write_text(render())
