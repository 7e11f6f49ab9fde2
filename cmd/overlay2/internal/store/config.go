package store

import (
	"encoding/json"
	"unicode/utf8"
)

// Config is the bytes of an image's config. They must stay as they are, since the image's id is their digest. In a record they
// are a text, or {"base64": ...} where JSON's texts, which are UTF-8, cannot hold them.
type Config string

type base64Config struct {
	Base64 []byte `json:"base64"`
}

// MarshalJSON writes one of the two forms.
func (c Config) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(c)) {
		return json.Marshal(string(c))
	}
	return json.Marshal(base64Config{[]byte(c)})
}

// UnmarshalJSON reads both.
func (c *Config) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var raw base64Config
		if err := json.Unmarshal(b, &raw); err != nil {
			return err
		}
		*c = Config(raw.Base64)
		return nil
	}
	return json.Unmarshal(b, (*string)(c))
}
