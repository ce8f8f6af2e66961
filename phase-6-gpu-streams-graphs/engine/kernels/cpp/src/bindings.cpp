// The interface to Python. Tensors are passed as addresses; the caller keeps them alive (see ../__init__.py).
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "need.h"
#include "decode.h"

namespace py = pybind11;
using namespace lab;

namespace {

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

std::vector<float> floats(uintptr_t address, size_t count) {
    return {pointer<float>(address), pointer<float>(address) + count};
}

// A Python object for as long as the pointer lives; the last copy may go on a thread without Python's lock.
std::shared_ptr<void> kept(py::object object) {
    return {new py::object(std::move(object)), [](void* held) {
        const py::gil_scoped_acquire lock;
        delete static_cast<py::object*>(held);
    }};
}

Kind kind_of(int number) {
    if (number < 0 || number > 4) throw std::invalid_argument("no such number format");
    return Kind(number);
}

Shape shape_of(int kind, int outputs, int inputs, bool wide, bool pair, int scale_group, bool zeros, bool factor, bool bias) {
    return {kind_of(kind), outputs, inputs, wide, pair, scale_group, zeros, factor, bias};
}

Model model_of(const py::dict& d) {
    Model m;
    auto number = [&](const char* name) { return d[name].cast<int>(); };
    m.layers = number("layers"), m.width = number("width"), m.heads = number("heads"), m.kv_heads = number("kv_heads");
    m.head_dim = number("head_dim"), m.ffn = number("ffn"), m.vocab = number("vocab");
    m.position_offset = number("position_offset");
    m.gated = d["gated"].cast<bool>(), m.rope = d["rope"].cast<bool>();
    const int activation = number("activation");
    if (activation < 0 || activation > int(Activation::relu)) throw std::invalid_argument("no such activation");
    m.activation = Activation(activation);
    m.norm_eps = d["norm_eps"].cast<float>();
    return m;
}

Sampling sampling_of(double temperature, int top_k, double top_p, double min_p, uint64_t seed) {
    const Sampling how{temperature, top_k, top_p, min_p, seed};
    how.check();
    return how;
}

const Isa& isa_of(const std::string& name) {
    const Isa* isa = find_isa(name.c_str());
    need(isa != nullptr, "the instruction set is not loaded");
    return *isa;
}

// One member of every sequence's result.
template <class T>
std::vector<T> of_rows(const Decoded& step, T Result::*member) {
    std::vector<T> found;
    for (const Result& result : step.results) found.push_back(result.*member);
    return found;
}

}  // namespace

PYBIND11_MODULE(lab_cpp, module) {
    module.attr("PANEL") = PANEL;
    module.attr("MAX_BLOCK") = MAX_BLOCK;
    module.def("load_isa", [](const std::string& path, const std::string& symbol) { load_isa(path.c_str(), symbol.c_str()); });
    module.def("uniform", &uniform);

    py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena", py::module_local())
        .def(py::init<size_t>())
        .def_property_readonly("used", &Arena::used);

    py::class_<Shape>(module, "Shape", py::module_local())
        .def(py::init(&shape_of), py::arg("kind"), py::arg("outputs"), py::arg("inputs"), py::arg("wide"), py::arg("pair"),
             py::arg("scale_group"), py::arg("zeros"), py::arg("factor"), py::arg("bias"))
        .def_property_readonly("bytes", &Packed::bytes);

    py::class_<Packed, std::shared_ptr<Packed>>(module, "Packed", py::module_local())
        .def(py::init<std::shared_ptr<Arena>, const Shape&>())
        .def("fill", [](Packed& p, int first, int count, uintptr_t rows, int kind) {
            py::gil_scoped_release release;
            p.fill(first, count, pointer<void>(rows), kind_of(kind));
        })
        .def("fill_levels", [](Packed& p, int first, int count, uintptr_t levels, uintptr_t scales, uintptr_t zeros) {
            py::gil_scoped_release release;
            p.fill_levels(first, count, pointer<void>(levels), pointer<uint16_t>(scales), pointer<uint16_t>(zeros));
        })
        .def("set_bias", [](Packed& p, uintptr_t bias) { p.set_bias(pointer<float>(bias)); })
        .def("set_factor", [](Packed& p, uintptr_t factor) { p.set_factor(pointer<float>(factor)); })
        .def("set_order", &Packed::set_order);

    py::class_<View, std::shared_ptr<View>>(module, "View", py::module_local())
        .def(py::init([](int kind, int pages, int kv_heads, int slots, int head_dim, bool ring, std::vector<uintptr_t> keys,
                         std::vector<uintptr_t> values, std::vector<uintptr_t> key_scales, std::vector<uintptr_t> value_scales, py::object owner) {
            auto view = std::make_shared<View>();
            view->cache.kind = kind_of(kind);
            view->cache.pages = pages, view->cache.kv_heads = kv_heads;
            view->cache.slots = slots, view->cache.head_dim = head_dim, view->cache.ring = ring;
            for (uintptr_t p : keys) view->keys.push_back(pointer<void>(p));
            for (uintptr_t p : values) view->values.push_back(pointer<void>(p));
            for (uintptr_t p : key_scales) view->key_scales.push_back(pointer<uint16_t>(p));
            for (uintptr_t p : value_scales) view->value_scales.push_back(pointer<uint16_t>(p));
            view->owner = kept(std::move(owner));
            view->bind();
            return view;
        }));

    py::class_<Row>(module, "Row", py::module_local()).def(py::init([](std::shared_ptr<View> view, std::vector<int> pages, int held) {
        return Row{std::move(view), std::move(pages), held};
    }));

    py::class_<Sampling>(module, "Sampling", py::module_local())
        .def(py::init(&sampling_of), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"));

    py::class_<Sequence>(module, "Sequence", py::module_local())
        .def(py::init([](Row row, std::vector<int> new_tokens, const Sampling& how, int sample, int position) {
            return Sequence{std::move(row), std::move(new_tokens), how, sample, position};
        }));

    py::class_<Engine>(module, "Engine", py::module_local())
        .def(py::init([](const py::dict& config, int threads, const std::string& isa) {
            need(threads >= 1 && threads <= 4096, "a model has between 1 and 4096 threads");
            return std::make_unique<Engine>(model_of(config), threads, &isa_of(isa));
        }))
        .def_property_readonly("isa", [](const Engine& e) { return std::string(e.isa->name); })
        .def_property_readonly("narrow_bf16", [](const Engine& e) { return e.isa->narrow_bf16; })
        .def_property_readonly("threads", &Engine::threads)
        .def_property("hurried", [](const Engine& e) { return e.hurried.load(); }, [](Engine& e, bool on) { e.hurried = on; })
        .def("set_matrix", &Engine::set_matrix)
        .def("set_window", &Engine::set_window)
        .def("set_vector", [](Engine& e, int layer, const std::string& which, uintptr_t values, size_t count) {
            need(values != 0, "the vector has no memory");
            e.set_vector(layer, which, floats(values, count));
        })
        .def("set_rotation", [](Engine& e, uintptr_t cos, uintptr_t sin, size_t count) {
            need(cos != 0 && sin != 0, "the rotation has no memory");
            e.set_rotation(floats(cos, count), floats(sin, count));
        })
        .def("set_table", [](Engine& e, const std::string& which, uintptr_t data, int kind, int rows) {
            (which == "embedding" ? e.model.embedding : e.model.positions) = {pointer<void>(data), kind_of(kind), rows};
        })
        .def("set_split", [](Engine& e, int rank, int ranks, bool by_outputs, int vocab, std::function<void(int, uintptr_t, uintptr_t, size_t)> exchange) {
            e.set_split({rank, ranks, by_outputs, vocab}, [exchange = std::move(exchange)](How how, float* mine, float* all, size_t count) {
                exchange(int(how), reinterpret_cast<uintptr_t>(mine), reinterpret_cast<uintptr_t>(all), count);
            });
        })
        .def("set_join", [](Engine& e, std::shared_ptr<Packed> join) {
            need(join != nullptr, "there is no matrix");
            e.set_join(std::move(join));
        })
        .def("join", [](Engine& e, const std::vector<int>& tokens, uintptr_t features, uintptr_t out) {
            py::gil_scoped_release release;
            e.join(tokens, pointer<float>(features), pointer<float>(out));
        })
        .def("finish", &Engine::finish)
        .def("step", [](Engine& e, std::vector<int> tokens, std::vector<int> positions, std::vector<Row> rows, std::vector<int> counts,
                        std::vector<int> parents, std::vector<int> wanted, std::vector<int> taps, uintptr_t hidden, uintptr_t logits, uintptr_t tapped, uintptr_t inputs) {
            py::gil_scoped_release release;
            e.step({std::move(tokens), std::move(positions), std::move(rows), std::move(counts), std::move(parents),
                    std::move(wanted), std::move(taps), pointer<float>(inputs), pointer<float>(hidden), pointer<float>(logits), pointer<float>(tapped)});
        })
        .def("product", [](Engine& e, const Packed& packed, uintptr_t x, int count, uintptr_t out) {
            py::gil_scoped_release release;
            e.product(packed.matrix, packed.shape.outputs, pointer<float>(x), count, pointer<float>(out));
        })
        .def("read_speed", [](Engine& e, uintptr_t from, size_t count, int repeats) {
            py::gil_scoped_release release;
            return e.read_speed(pointer<float>(from), count, repeats);
        });

    py::class_<Drafter>(module, "Drafter", py::module_local())
        .def("propose", [](Drafter& drafter, const std::vector<int>& counts, uintptr_t probs) {
            std::vector<std::vector<int>> tokens;
            py::gil_scoped_release release;
            const std::lock_guard<std::recursive_mutex> hold(drafter.engine().mutex);
            for (Drafted& draft : drafter.propose(counts, pointer<float>(probs))) tokens.push_back(std::move(draft.tokens));
            return tokens;
        });
    py::class_<ModelDrafter, Drafter>(module, "ModelDrafter", py::module_local())
        .def(py::init<Engine&, Batch, std::vector<uint32_t>>(), py::keep_alive<1, 2>());
    py::class_<EagleDrafter, Drafter>(module, "EagleDrafter", py::module_local())
        .def(py::init([](Engine& layer, Batch batch, std::vector<uint32_t> purposes, std::shared_ptr<Packed> reduce, int width, uintptr_t states, const std::vector<int>& counts) {
            std::vector<std::vector<float>> read;
            const float* from = pointer<float>(states);
            need(width > 0 && (from != nullptr || counts.empty()), "the states have no memory");
            for (int count : counts) {
                need(count >= 0, "a number of states is below 0");
                read.emplace_back(from, from + size_t(count) * size_t(width));
                from += size_t(count) * size_t(width);
            }
            return std::make_unique<EagleDrafter>(layer, std::move(batch), std::move(purposes), std::move(reduce), width, std::move(read));
        }), py::keep_alive<1, 2>());
    py::class_<Medusa, std::shared_ptr<Medusa>>(module, "Medusa", py::module_local())
        .def(py::init([](Engine& target, int heads, int states, std::shared_ptr<Packed> reduce, std::shared_ptr<Packed> token, uintptr_t norm,
                         float eps, std::vector<std::shared_ptr<Packed>> blocks, std::vector<std::shared_ptr<Packed>> mix,
                         std::shared_ptr<Packed> head) {
            Medusa medusa{target, heads, states, std::move(reduce), std::move(token), {}, eps, std::move(blocks), std::move(mix), std::move(head)};
            if (medusa.token != nullptr) medusa.token_norm = floats(norm, size_t(target.model.width));
            medusa.check();
            return std::make_shared<Medusa>(std::move(medusa));
        }), py::keep_alive<1, 2>())
        .def("logits", [](const Medusa& medusa, uintptr_t states, const std::vector<int>& tokens, uintptr_t out) {
            py::gil_scoped_release release;
            need(states != 0 && out != 0, "states or logits have no memory");
            medusa.logits(pointer<float>(states), tokens, medusa.heads, pointer<float>(out));
        });
    py::class_<MedusaDrafter, Drafter>(module, "MedusaDrafter", py::module_local())
        .def(py::init([](std::shared_ptr<Medusa> medusa, Batch batch, std::vector<uint32_t> purposes, uintptr_t states) {
            need(medusa != nullptr && states != 0, "heads or states are missing");
            const size_t size = batch.size() * size_t(medusa->states);
            return std::make_unique<MedusaDrafter>(medusa, std::move(batch), std::move(purposes), floats(states, size));
        }), py::keep_alive<1, 2>());
    py::class_<GivenDrafter, Drafter>(module, "GivenDrafter", py::module_local())
        .def(py::init<Engine&, std::vector<std::vector<int>>>(), py::keep_alive<1, 2>());

    module.def("decode", [](Engine& target, Batch batch, Drafter* drafter, std::vector<int> counts, int steps, std::vector<int> limits, std::vector<bool> own,
                            std::vector<double> synthetic, std::vector<int> ends,
                            uintptr_t states, size_t room, std::vector<int> taps, double budget_ms) {
        std::vector<Decoded> made;
        {
            py::gil_scoped_release release;
            made = decode(target, std::move(batch), drafter, {std::move(counts), steps, std::move(limits), budget_ms, std::move(own), std::move(synthetic), std::move(ends)},
                          {pointer<float>(states), room, std::move(taps)});
        }
        py::list found;
        for (const Decoded& step : made)  // the fields of `Decoded` in model.py
            found.append(py::make_tuple(of_rows(step, &Result::draft), of_rows(step, &Result::accepted), of_rows(step, &Result::next),
                                        of_rows(step, &Result::computed), step.draft_ms, step.verify_ms, step.accept_ms));
        return found;
    });

    // Rows of logits or probabilities, [rows, vocab] each.
    module.def("probabilities", [](const std::string& isa, uintptr_t x, int rows, int vocab, const Sampling& how) {
        py::gil_scoped_release release;
        need(x != 0 && rows >= 0 && vocab > 0, "there are no logits");
        for (int r = 0; r < rows; ++r) probabilities(isa_of(isa), pointer<float>(x) + size_t(r) * vocab, vocab, how);
    });
    module.def("choose", [](const std::string& isa, uintptr_t logits, int vocab, const std::vector<Sampling>& how,
                            std::vector<int64_t> samples, std::vector<int64_t> positions) {
        py::gil_scoped_release release;
        need(logits != 0 && vocab > 0, "there are no logits");
        need(how.size() == positions.size() && samples.size() == positions.size(), "parameters, samples and positions differ in number");
        std::vector<float> spare(static_cast<size_t>(vocab));
        std::vector<int> tokens;
        for (size_t r = 0; r < samples.size(); ++r)
            tokens.push_back(choose(isa_of(isa), pointer<float>(logits) + r * size_t(vocab), vocab, how[r],
                                    uint32_t(samples[r]), uint32_t(positions[r]), spare.data()));
        return tokens;
    });
    module.def("verify", [](const std::string& isa, uintptr_t draft, int count, uintptr_t draft_probs,
                            uintptr_t target_probs, int vocab, uint64_t seed, int64_t sample, int64_t position,
                            bool certain, uintptr_t ratios) {
        py::gil_scoped_release release;
        need(vocab > 0 && count >= 0 && target_probs != 0, "there are no distributions");
        need(count == 0 || (draft != 0 && ratios != 0), "the draft or its ratios have no memory");
        for (int i = 0; i < count; ++i) {
            const int64_t token = pointer<int64_t>(draft)[i];
            need(token >= 0 && token < vocab, "a draft token is not in the vocabulary");
        }
        std::vector<float> spare(static_cast<size_t>(vocab));
        const Accepted verdict = verify(
            isa_of(isa), pointer<int64_t>(draft), count, pointer<float>(draft_probs), pointer<float>(target_probs),
            vocab, seed, uint32_t(sample), uint32_t(position), certain, pointer<float>(ratios), spare.data()
        );
        return std::make_pair(verdict.accepted, verdict.next);
    });
}
