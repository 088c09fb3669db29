// Enough JSON to read an artifact's manifest and a safetensors header: values are looked up, never written.
#pragma once

#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  std::map<std::string, Json> fields;  // of an object
  std::vector<Json> items;             // of an array
  std::string text;                    // of a string, or a number, true, false and null as they stand

  const Json& at(const std::string& key) const {
    auto found = fields.find(key);
    if (found == fields.end()) throw std::runtime_error("the JSON has no field " + key);
    return found->second;
  }
  int64_t integer() const { return std::stoll(text); }
  static Json parse(const std::string& source);
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : source_(source) {}

  Json value() {
    Json json;
    char c = next();
    if (c == '{') {
      at_++;
      for (bool first = true; next() != '}'; first = false) {
        if (!first) expect(',');
        std::string key = string();
        expect(':');
        json.fields[key] = value();
        if (next() != ',' && next() != '}') fail();
      }
      at_++;
    } else if (c == '[') {
      at_++;
      for (bool first = true; next() != ']'; first = false) {
        if (!first) expect(',');
        json.items.push_back(value());
        if (next() != ',' && next() != ']') fail();
      }
      at_++;
    } else if (c == '"') {
      json.text = string();
    } else {
      while (at_ < source_.size() && (std::isalnum(source_[at_]) || std::string("+-.").find(source_[at_]) != std::string::npos))
        json.text += source_[at_++];
      if (json.text.empty()) fail();
    }
    return json;
  }

 private:
  const std::string& source_;
  size_t at_ = 0;

  // The next character that is no space; it is not consumed.
  char next() {
    while (at_ < source_.size() && std::isspace(static_cast<unsigned char>(source_[at_]))) at_++;
    if (at_ >= source_.size()) fail();
    return source_[at_];
  }
  void expect(char c) {
    if (next() != c) fail();
    at_++;
  }
  std::string string() {
    expect('"');
    std::string text;
    while (at_ < source_.size() && source_[at_] != '"') {
      if (source_[at_] == '\\') {
        if (++at_ >= source_.size()) fail();
        if (source_[at_] == 'u') throw std::runtime_error("\\u in JSON: names here are plain ASCII");
        text += source_[at_] == 'n' ? '\n' : source_[at_] == 't' ? '\t' : source_[at_];
      } else {
        text += source_[at_];
      }
      at_++;
    }
    expect('"');
    return text;
  }
  [[noreturn]] void fail() const { throw std::runtime_error("bad JSON at byte " + std::to_string(at_)); }
};

inline Json Json::parse(const std::string& source) { return JsonReader(source).value(); }
