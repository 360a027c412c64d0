package host

import "github.com/nbdctl/nbdctl/server"

// A Traffic counts what one connection to the kernel has carried, as JSON
// shows it.
type Traffic struct {
	Read        OpTraffic `json:"read"`
	Write       OpTraffic `json:"write"`
	Flush       OpTraffic `json:"flush"`
	Trim        OpTraffic `json:"trim"`
	WriteZeroes OpTraffic `json:"write_zeroes"`
	// InFlight is the number of requests being served now.
	InFlight int `json:"in_flight"`
}

// An OpTraffic counts the requests of one kind.
type OpTraffic struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	Errors   uint64 `json:"errors"`
}

func trafficOf(stats []server.Stats) []Traffic {
	t := make([]Traffic, len(stats))
	for i, s := range stats {
		t[i] = Traffic{
			Read:        opTrafficOf(&s.Read),
			Write:       opTrafficOf(&s.Write),
			Flush:       opTrafficOf(&s.Flush),
			Trim:        opTrafficOf(&s.Trim),
			WriteZeroes: opTrafficOf(&s.WriteZeroes),
			InFlight:    s.InFlight,
		}
	}
	return t
}

func opTrafficOf(s *server.OpStats) OpTraffic {
	return OpTraffic{Requests: s.Requests, Bytes: s.Bytes, Errors: s.Errors}
}
