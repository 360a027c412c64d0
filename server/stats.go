package server

import "github.com/nbdctl/nbdctl/server/metrics"

// What was served is counted by package metrics.
type (
	// Stats is what a connection, or all connections of an export, have served.
	Stats = metrics.Stats
	// OpStats is what they have served of one kind of request.
	OpStats = metrics.OpStats
	// A Histogram counts requests by how long they took.
	Histogram = metrics.Histogram
)
