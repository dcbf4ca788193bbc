{{- define "knapsack.selector" -}}
app.kubernetes.io/name: knapsack-rl
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "knapsack.podLabels" -}}
{{ include "knapsack.selector" . }}
app.kubernetes.io/part-of: knapsack-rl
app.kubernetes.io/version: {{ .root.Chart.AppVersion }}
{{- end -}}

{{- define "knapsack.labels" -}}
{{ include "knapsack.podLabels" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "knapsack.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "knapsack.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "knapsack.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .podSpec }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{- define "knapsack.confined" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Probes of the health port: plaintext gRPC, by number, at the pod's address. */ -}}
{{- define "knapsack.probes" -}}
startupProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: {{ .startupPeriod }}
  timeoutSeconds: {{ .timeout }}
  failureThreshold: {{ .startupFailures }}
readinessProbe:
  grpc: {port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: {{ .timeout }}
livenessProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}
