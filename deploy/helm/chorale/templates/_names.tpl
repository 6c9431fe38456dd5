{{- define "chorale.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "chorale.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- $name := include "chorale.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "chorale.selector" -}}
app.kubernetes.io/name: {{ include "chorale.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "chorale.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "chorale.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "chorale.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "chorale.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "chorale.image" -}}
{{- with .Values.image }}
{{- $tag := default $.Chart.AppVersion .tag }}
{{- if .digest }}{{ printf "%s:%s@%s" .repository $tag .digest }}{{ else }}{{ printf "%s:%s" .repository $tag }}{{ end }}
{{- end }}
{{- end }}

{{- define "chorale.storeClaim" -}}
{{- default (printf "%s-store" (include "chorale.fullname" .)) .Values.store.existingClaim }}
{{- end }}

{{- define "chorale.hasRedis" -}}
{{- if or .Values.redis.existingSecret .Values.redis.trial.enabled }}true{{ end }}
{{- end }}

{{- define "chorale.isSharedStore" -}}
{{- if or .Values.store.s3.bucket .Values.store.existingClaim (has "ReadWriteMany" .Values.store.accessModes) }}true{{ end }}
{{- end }}

{{- define "chorale.maxReplicas" -}}
{{- if eq .Values.autoscaling.kind "none" }}{{ .Values.replicaCount }}{{ else }}{{ .Values.autoscaling.maxReplicas }}{{ end }}
{{- end }}

{{- /* What cannot work is refused here, with the way out, not found out in the cluster. */ -}}
{{- define "chorale.check" -}}
{{- $several := gt (int (include "chorale.maxReplicas" .)) 1 }}
{{- if and $several (not (include "chorale.hasRedis" .)) }}
{{- fail "several servers share one registry: set redis.existingSecret (or redis.trial.enabled for a trial), or keep one replica" }}
{{- end }}
{{- if and $several (not (include "chorale.isSharedStore" .)) }}
{{- fail "several servers write one store: set store.accessModes to [ReadWriteMany], give store.existingClaim or store.s3.bucket, or keep one replica" }}
{{- end }}
{{- include "chorale.checkObjectStore" . }}
{{- if and .Values.redis.existingSecret .Values.redis.trial.enabled }}
{{- fail "redis.existingSecret and redis.trial.enabled are two registries: choose one" }}
{{- end }}
{{- if and .Values.redis.trial.enabled (not .Values.networkPolicy.enabled) }}
{{- fail "redis.trial has no password: it needs networkPolicy.enabled" }}
{{- end }}
{{- if lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas) }}
{{- fail (printf "autoscaling.maxReplicas %v is below autoscaling.minReplicas %v" .Values.autoscaling.maxReplicas .Values.autoscaling.minReplicas) }}
{{- end }}
{{- if and (eq .Values.trainer.kind "deployment") (not (include "chorale.isSharedStore" .)) }}
{{- fail "a trainer of its own writes the servers' store: set store.accessModes to [ReadWriteMany], or give store.existingClaim or store.s3.bucket" }}
{{- end }}
{{- if and (hasPrefix "/" .Values.model.path) (not .Values.model.existingClaim) }}
{{- fail (printf "model.path %s is a folder: name the claim that holds it in model.existingClaim, or give a Hugging Face id" .Values.model.path) }}
{{- end }}
{{- if and (not (hasPrefix "/" .Values.model.path)) .Values.networkPolicy.enabled (not .Values.networkPolicy.extraEgress) }}
{{- fail (printf "model.path %s is downloaded: allow it in networkPolicy.extraEgress" .Values.model.path) }}
{{- end }}
{{- if and .Values.redis.existingSecret .Values.networkPolicy.enabled (not .Values.networkPolicy.redisTo) }}
{{- fail "redis.existingSecret names a Redis outside this release: say where it is in networkPolicy.redisTo" }}
{{- end }}
{{- if and .Values.gateway.inferencePool.enabled (ne .Values.config.metricsCompat "vllm") }}
{{- fail "the endpoint picker reads vLLM's names: gateway.inferencePool.enabled needs config.metricsCompat vllm" }}
{{- end }}
{{- if and .Values.auth.requireKeys (not .Values.monitoring.metricsKeySecret) (or .Values.monitoring.serviceMonitor .Values.monitoring.podMonitor) }}
{{- fail "with auth.requireKeys Prometheus needs a key of scope metrics: set monitoring.metricsKeySecret" }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor .Values.monitoring.podMonitor }}
{{- fail "monitoring.serviceMonitor and monitoring.podMonitor would count everything twice: choose one" }}
{{- end }}
{{- if le (int .Values.lifecycle.drainTimeoutSeconds) (int .Values.lifecycle.drainDelaySeconds) }}
{{- fail (printf "lifecycle.drainTimeoutSeconds %v must be more than lifecycle.drainDelaySeconds %v" .Values.lifecycle.drainTimeoutSeconds .Values.lifecycle.drainDelaySeconds) }}
{{- end }}
{{- end }}

{{- define "chorale.checkObjectStore" -}}
{{- $s3 := .Values.store.s3 }}
{{- if $s3.bucket }}
{{- if not (include "chorale.hasRedis" .) }}
{{- fail "store.s3 is what several servers share, through Redis: set redis.existingSecret (or redis.trial.enabled for a trial)" }}
{{- end }}
{{- if .Values.store.existingClaim }}
{{- fail (printf "store.existingClaim %s and store.s3.bucket %s are two stores: choose one" .Values.store.existingClaim $s3.bucket) }}
{{- end }}
{{- if and .Values.auth.requireKeys (not .Values.auth.pepperSecret) }}
{{- fail "keys that lie in an object store need a pepper that all servers have: set auth.pepperSecret" }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.objectStoreTo) }}
{{- fail "store.s3 is outside this release: say where it is in networkPolicy.objectStoreTo" }}
{{- end }}
{{- else if or $s3.prefix $s3.endpoint $s3.region $s3.existingSecret }}
{{- fail "store.s3 without a bucket: name it in store.s3.bucket" }}
{{- end }}
{{- end }}

{{- define "chorale.containerSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "chorale.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# a store of many files would be walked at every start
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* What server and trainer have in common: configuration, secrets, folders. */ -}}
{{- define "chorale.environment" -}}
envFrom:
  - configMapRef: {name: {{ include "chorale.fullname" . }}}
env:
  # /tmp and /cache are the only places beside /store that may be written
  - {name: HOME, value: /tmp}
  - {name: HF_HOME, value: /cache/huggingface}
  - {name: TRITON_CACHE_DIR, value: /cache/triton}
  - {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
  {{- with .Values.auth.existingSecret }}
  - name: CHORALE_API_KEY
    valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.auth.apiKeyKey }}}}
  {{- end }}
  {{- if .Values.redis.existingSecret }}
  - name: CHORALE_REDIS_URL
    valueFrom: {secretKeyRef: {name: {{ .Values.redis.existingSecret }}, key: {{ .Values.redis.urlKey }}}}
  {{- else if .Values.redis.trial.enabled }}
  - {name: CHORALE_REDIS_URL, value: "redis://{{ include "chorale.fullname" . }}-redis:6379"}
  {{- end }}
  {{- if and .Values.store.s3.bucket .Values.store.s3.existingSecret }}
  {{- with .Values.store.s3 }}
  - name: AWS_ACCESS_KEY_ID
    valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .accessKeyIdKey }}}}
  - name: AWS_SECRET_ACCESS_KEY
    valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .secretAccessKeyKey }}}}
  {{- end }}
  {{- end }}
  {{- with .Values.pod.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "chorale.mounts" -}}
volumeMounts:
  - {name: store, mountPath: /store}
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /cache}
  {{- if .Values.model.existingClaim }}
  - {name: models, mountPath: /models, readOnly: true}
  {{- end }}
  {{- if .Values.auth.pepperSecret }}
  - {name: pepper, mountPath: /secrets/pepper, readOnly: true}
  {{- end }}
{{- end }}

{{- define "chorale.volumes" -}}
volumes:
  - name: store
    {{- if not .Values.store.s3.bucket }}
    persistentVolumeClaim: {claimName: {{ include "chorale.storeClaim" . }}}
    {{- else if eq .Values.store.s3.copies "emptyDir" }}
    # copies of what lies in the object store
    emptyDir: {sizeLimit: {{ .Values.store.size }}}
    {{- else }}
    # copies of what lies in the object store: a claim of this pod's own
    ephemeral:
      volumeClaimTemplate:
        metadata:
          labels: {{- include "chorale.selector" . | nindent 12 }}
        spec:
          accessModes: [ReadWriteOnce]
          {{- with .Values.store.storageClass }}
          storageClassName: {{ . }}
          {{- end }}
          resources:
            requests: {storage: {{ .Values.store.size }}}
    {{- end }}
  - name: tmp
    emptyDir: {sizeLimit: {{ .Values.pod.tmpSize }}}
  - name: cache
    emptyDir: {}
  {{- with .Values.model.existingClaim }}
  - name: models
    persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
  {{- end }}
  {{- with .Values.auth.pepperSecret }}
  - name: pepper
    # readable by the server's group alone
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
{{- end }}

{{- define "chorale.placement" -}}
{{- with .Values.pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .Values.pod.tolerations }}
{{- if or (gt (int .Values.gpus) 0) (gt (int .Values.trainer.gpus) 0) }}
{{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "chorale.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if gt (int .gpus) 0 }}
{{- $_ := set $resources.limits "nvidia.com/gpu" (int .gpus) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "chorale.trainerContainer" -}}
name: trainer
image: {{ include "chorale.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [train-worker{{ if gt (int .Values.trainer.gpus) 0 }}, --device, cuda{{ end }}]
{{ include "chorale.environment" . }}
resources: {{- include "chorale.resources" .Values.trainer | nindent 2 }}
securityContext: {{- include "chorale.containerSecurity" . | nindent 2 }}
{{ include "chorale.mounts" . }}
{{- end }}
