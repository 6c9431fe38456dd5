// Checks objects against the published custom resource definitions; prints what they refuse, as JSON.
import { readFileSync } from "node:fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { HTTPRoute } from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute";
import { ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor";
import { PodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor";
import { PrometheusRule } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule";

const kinds = { ScaledObject, HTTPRoute, ServiceMonitor, PodMonitor, PrometheusRule };
const refused = [];
for (const item of JSON.parse(readFileSync(process.argv[2], "utf-8"))) {
  try {
    new kinds[item.kind](item).validate();
  } catch (error) {
    refused.push(`${item.kind}: ${error.message}`);
  }
}
console.log(JSON.stringify(refused));
